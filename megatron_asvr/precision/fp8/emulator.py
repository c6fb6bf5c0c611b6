"""The products of a model chunk in 8 bits: put into its linears, and kept from step to step."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron-core)

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from megatron_asvr.config.schema import Fp8Config
from megatron_asvr.parallel.collectives import all_reduce_max
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.precision.fp8.product import Product, parallel_linear
from megatron_asvr.precision.fp8.watched import EXPERT, Watched

STATE = "fp8."  # begins the names of what a checkpoint holds of products


class Emulator(Watched):
    """The products of one model chunk.

    A module takes part by having an attribute ``fp8``: None, or a dictionary with an entry for each
    of several weights, whose names are joined to the module's. Of megatron-core's parallel linears
    all take part.

    Args:
        chunk: the model chunk; its linears are changed.
        names: canonical name of each module by its path.
        decided: from ``policy.decide``.
        settings: recipe and format.
        groups: process groups of the layout.
        device: of the scales.
    """

    products: dict[str, Product]

    def __init__(
        self,
        chunk: nn.Module,
        names: Mapping[str, str],
        decided: Mapping[str, str | None],
        settings: Fp8Config,
        *,
        groups: Groups,
        device: torch.device,
    ) -> None:
        super().__init__({}, groups=groups, device=device)
        self._settings = settings

        def product(name: str) -> Product | None:
            if decided[name] is not None:
                return None
            made = Product(name, settings, device=device)
            return self.products.setdefault(name, made)

        for path, module in chunk.named_modules():
            parallel = isinstance(module, (ColumnParallelLinear, RowParallelLinear))
            if not (parallel or hasattr(module, "fp8")):
                continue
            name = names[path]
            if isinstance(slots := getattr(module, "fp8", None), dict):
                slots.update({slot: product(f"{name}.{slot}") for slot in slots})
                continue
            module.fp8 = product(name)
            if parallel and module.fp8 is not None:
                module._forward_impl = partial(parallel_linear, module.fp8)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, largest values are noted for the scales of the next step."""
        for product in self.products.values():
            product.amax.zero_()  # of a step that was given up
            product.records = True
        try:
            yield
        finally:
            for product in self.products.values():
                product.records = False

    def update(self) -> None:
        """Make the scales of the next step; all ranks of the pipeline stage take part.

        The largest values are those of all ranks that hold a part of the same weight or see other
        samples: the whole stage, or for an expert the ranks that hold it.
        """
        if self._settings.recipe != "delayed":
            return
        for group, names in self._by_holders():
            chosen = [self.products[name] for name in names]
            amax = all_reduce_max(torch.stack([p.amax for p in chosen]), group=group)
            for product, largest in zip(chosen, amax, strict=True):
                product.next_scales(largest)

    def state(self) -> Iterator[tuple[str, Tensor, bool]]:
        """What a checkpoint must hold: names, tensors, and whether this rank is to write them.

        Nothing but for delayed scaling.
        """
        if self._settings.recipe != "delayed":
            return
        groups = self._groups
        is_first = groups.tp_rank == 0 and groups.dp_cp.rank() == 0
        for name, product in self.products.items():
            writes = groups.expert_dp.rank() == 0 if EXPERT in name else is_first
            yield f"{STATE}{name}.scale", product.scale, writes
            yield f"{STATE}{name}.history", product.history, writes
