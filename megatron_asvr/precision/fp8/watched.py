"""Linears of a model chunk that multiply in 8 bits, as the guard sees them, whoever multiplies."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_asvr.parallel.collectives import sum_in_place
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.precision.fp8.drift import Drift

EXPERT = ".local_experts."


class Watchable(Protocol):
    """A linear that can multiply in 8 bits.

    Attributes:
        is_on: whether it does; the guard turns it off.
        drift: while it is set, results are exact, and those in 8 bits are compared with them.
    """

    is_on: bool
    drift: Drift | None


class Watched:
    """The linears of one model chunk.

    Args:
        products: by canonical name.
        groups: process groups of the layout.
        device: of the chunk.
    """

    def __init__(
        self, products: Mapping[str, Watchable], *, groups: Groups, device: torch.device
    ) -> None:
        self.products = products
        self._groups, self._device = groups, device

    @contextlib.contextmanager
    def compared(self) -> Iterator[dict[str, Drift]]:
        """Inside, results are exact, and those in 8 bits are compared with them.

        What is given, by name, holds the sums over all ranks of the stage afterwards; these take
        part together.
        """
        drifts: dict[str, Drift] = {}
        for name, product in self.products.items():
            if product.is_on:
                product.drift = drifts[name] = Drift(device=self._device)
        try:
            yield drifts
        finally:
            for product in self.products.values():
                product.drift = None
        for group, names in self._by_holders():
            on = [drifts[name] for name in names if name in drifts]
            sum_in_place([x for drift in on for x in (drift.products, drift.values)], group=group)

    def turn_off(self, names: Collection[str]) -> None:
        """Multiply in the base precision from now on; names that are not here are left out."""
        for name in names:
            if name in self.products:
                self.products[name].is_on = False

    def _by_holders(self) -> list[tuple[ProcessGroup, list[str]]]:
        """Names, and the ranks that hold a part of their weights or see other samples."""
        dense = [name for name in self.products if EXPERT not in name]
        experts = [name for name in self.products if EXPERT in name]
        both = [(self._groups.tp_cp_dp, dense), (self._groups.expert_dp, experts)]
        return [(group, names) for group, names in both if names]

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around the passes of a step; nothing where scales are not ours."""
        yield

    def update(self) -> None:
        """After a step; all ranks of the pipeline stage take part."""

    def state(self) -> Iterator[tuple[str, Tensor, bool]]:
        """What a checkpoint must hold: names, tensors, and whether this rank is to write them."""
        return iter(())
