"""megatron-core's Transformer Engine linears, norms and attention, for CUDA.

Attention is the THD kind: all rows of a micro-batch are one stream of tokens, and where documents
end says who sees whom. Padding is given to the kernels as the end of its document: it stands behind
the tokens, so none of them sees it, and every position of the output and of the gradients is
written. Told to leave it out, some kernels leave there whatever was in memory, which a weight's
gradient would read; others are not available at all.

Attention here has no form for independent questions about one image, so the data pipeline repeats
the image (``train/assemble.py``). Nothing in this file has run yet.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron-core)

import torch
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F
from transformer_engine.common.recipe import Float8CurrentScaling

from megatron_asvr.batch import MicroBatch
from megatron_asvr.config.schema import Fp8Config
from megatron_asvr.errors import AsvrError
from megatron_asvr.precision import FUSED_NAMES
from megatron_asvr.precision.fp8.drift import Drift
from megatron_asvr.precision.fp8.product import Product as Rounding
from megatron_asvr.precision.fp8.shadow import Layer, Region, compared
from megatron_asvr.precision.fp8.shapes import pad_rows
from megatron_asvr.precision.fp8.watched import Watchable
from megatron_asvr.precision.routing import use_router


class PackedAttention(TEDotProductAttention):
    """Transformer Engine's attention over documents, which also knows context parallelism."""

    def forward(
        self, query_SBAC: Tensor, key_SBGC: Tensor, value_SBGC: Tensor, ends: Tensor, **_: Any
    ) -> Tensor:
        """Attended values [S, B, A * C]; A and G are this rank's query and key/value heads.

        Args:
            query_SBAC: queries, rotated; C is the width of a head, S this rank's columns.
            key_SBGC: keys, rotated.
            value_SBGC: values.
            ends: from ``attention_rule``.
        """
        num_positions, num_rows = query_SBAC.shape[:2]
        longest = num_positions * self.config.context_parallel_size
        documents = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            cu_seqlens_q_padded=ends,
            cu_seqlens_kv_padded=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        streams = (x.transpose(0, 1).flatten(0, 1) for x in (query_SBAC, key_SBGC, value_SBGC))
        out = super().forward(*streams, None, AttnMaskType.causal, packed_seq_params=documents)
        return out.view(num_rows, num_positions, -1).transpose(0, 1)


def attention_rule(batch: MicroBatch, *, sliding_window: int | None) -> Tensor:
    """Where the documents end, with their padding: int32 [documents + 1].

    Args:
        batch: with its ``cu_seqlens_padded``.
        sliding_window: known to the layers from their configuration.
    """
    if batch.cu_seqlens_padded is None:
        raise AsvrError(
            "Transformer Engine's attention needs cu_seqlens_padded, the micro-batch has none"
        )
    return batch.cu_seqlens_padded


def layer_spec(*, qk_norm: bool, num_experts: int | None) -> ModuleSpec:
    """One transformer layer of megatron-core with Transformer Engine's parts.

    Experts run one after another: the grouped kernel keeps its weights under other names.

    Args:
        qk_norm: normalise queries and keys per head.
        num_experts: of a mixture; None is one feed-forward part for every token.
    """
    spec = get_gpt_layer_with_transformer_engine_spec(
        qk_layernorm=qk_norm, num_experts=num_experts, moe_grouped_gemm=False
    )
    if num_experts is not None:
        use_router(spec)
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    spec.submodules.sharded_state_dict_keys_map = dict(FUSED_NAMES)
    return spec


class Product:
    """A linear in 8 bits by Transformer Engine, with a weight that stays where it is.

    It takes the place of ``fp8.product.Product`` in the parts that megatron-core does not build, so
    their weights have the same names and shapes whoever multiplies.

    Args:
        name: of the linear, canonical.
        settings: recipe and format.
        region: of 8 bits, for the guard.
        together: what multiplies it with its neighbours.

    Attributes:
        is_on: whether it multiplies in 8 bits; the guard turns it off.
        drift: while it is set, results are exact, and those in 8 bits are compared with them.
    """

    def __init__(
        self,
        name: str,
        settings: Fp8Config,
        region: Region,
        together: "GroupedProduct | None" = None,
    ) -> None:
        self.name, self.recipe = name, settings.recipe
        self.is_on = True
        self.drift: Drift | None = None
        self._together, self._region = together, region
        self._rounding = Rounding(name, settings, device=torch.device("cpu"))
        self._linear: te.Linear | None = None

    @property
    def grouped(self) -> "GroupedProduct | None":
        """What multiplies it together with its neighbours, while nothing is to be told apart."""
        return self._together if self.is_on and self.drift is None else None

    def __call__(self, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        """The linear's output [M, N].

        Args:
            x_MK: the input, its rows padded.
            weight_NK: the weight.
        """
        if self.drift is None:
            return self._multiply(x_MK, weight_NK)

        def run(x_MK: Tensor, in_8_bits: bool) -> Tensor:
            if not in_8_bits:
                return F.linear(x_MK, weight_NK)
            with self._region():
                return self._multiply(x_MK, weight_NK)

        return compared(run, x_MK, x_MK, (weight_NK,), self.drift, self._rounding)

    def _multiply(self, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        if self._linear is None:
            outputs, inputs = weight_NK.shape
            self._linear = te.Linear(
                inputs, outputs, bias=False, params_dtype=weight_NK.dtype, device="meta"
            )
        _lend(self._linear, weight=weight_NK)
        return self._linear(x_MK)


class GroupedProduct:
    """The linears of all depths in 8 bits, in one kernel.

    Args:
        recipe: of ``precision.fp8.recipe``.
    """

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe
        self._linear: te.GroupedLinear | None = None

    def __call__(self, x_DMK: Tensor, weight_DNK: Tensor) -> Tensor:
        """Outputs [D, M, N].

        Args:
            x_DMK: inputs, of as many rows for each depth.
            weight_DNK: weights.
        """
        depth, outputs, inputs = weight_DNK.shape
        if self._linear is None:
            self._linear = te.GroupedLinear(
                depth,
                inputs,
                outputs,
                bias=False,
                params_dtype=weight_DNK.dtype,
                device="meta",
            )
        _lend(self._linear, **{f"weight{d}": w_NK for d, w_NK in enumerate(weight_DNK)})
        padded = [pad_rows(x_MK, self.recipe) for x_MK in x_DMK]
        y_XN = self._linear(torch.cat(padded), [len(x_MK) for x_MK in padded])
        return y_XN.view(depth, -1, outputs)[:, : x_DMK.shape[1]]


def _lend(module: torch.nn.Module, **weights: Tensor) -> None:
    """Let a module of Transformer Engine compute with weights that are not its own."""
    for name, weight in weights.items():
        module._parameters.pop(name, None)
        module.__dict__[name] = weight


def product(x_MK: Tensor, weight_NK: Tensor, *, in_8_bits: bool) -> Tensor:
    """One product [M, N] as the layers make it; in 8 bits with current scaling.

    Args:
        x_MK: bf16, of rows and width that 8 bits can multiply.
        weight_NK: bf16.
        in_8_bits: or in bf16.
    """
    with te.autocast(enabled=in_8_bits, recipe=Float8CurrentScaling()):
        settings = Fp8Config(recipe="current")
        return Product("probe", settings, contextlib.nullcontext)(x_MK, weight_NK)


def packed_attention(config: TransformerConfig) -> PackedAttention:
    """The attention of a first layer; process groups are initialised.

    Args:
        config: megatron-core's.
    """
    return PackedAttention(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
    )


def use(
    chunk: torch.nn.Module,
    names: Mapping[str, str],
    decided: Mapping[str, str | None],
    settings: Fp8Config,
) -> dict[str, Watchable]:
    """Let the linears of a model chunk multiply in 8 bits; those that do, by canonical name.

    A forward pass of the chunk is one region of 8 bits, so that the largest values of delayed
    scaling are exchanged once, when it ends; megatron-core's own regions lie inside.

    Args:
        chunk: the model chunk; it is changed.
        names: canonical name of each module by its path.
        decided: for each linear the pattern that keeps it out, or None.
        settings: recipe and format.
    """
    region = functools.partial(get_fp8_context, chunk.config)
    found: dict[str, Watchable] = {}

    def product(name: str, together: GroupedProduct | None = None) -> Product | None:
        if decided[name] is None:
            found[name] = Product(name, settings, region, together)
        return found.get(name)

    for path, module in chunk.named_modules():
        name = names[path]
        if isinstance(module, (te.Linear, te.LayerNormLinear)):
            layer = Layer(
                module,
                Rounding(name, settings, device=torch.device("cpu")),
                exactly=functools.partial(_apart, module, te.autocast, enabled=False),
                in_8_bits=functools.partial(_apart, module, region),
            )
            layer.is_on = decided[name] is None
            if layer.is_on:
                found[name] = layer
        elif isinstance(getattr(module, "fp8", None), dict):
            kernels: dict[str, GroupedProduct] = {}
            for slot in module.fp8:
                matrix = slot.partition(".")[0]
                kernel = kernels.setdefault(matrix, GroupedProduct(settings.recipe))
                module.fp8[slot] = product(f"{name}.{slot}", kernel)
        elif name in decided:
            module.fp8 = product(name)
    chunk.forward = _in_8_bits(chunk.forward, region)
    return found


@contextlib.contextmanager
def _apart(module: torch.nn.Module, region: Region, **settings: Any) -> Iterator[None]:
    """A region in which a linear keeps nothing from its last call, nor of a gradient.

    Told that a micro-batch is the first, it rounds its weight again; and it gives the gradient of
    its weight instead of adding it up.
    """
    before, module.fuse_wgrad_accumulation = module.fuse_wgrad_accumulation, False
    module.is_first_microbatch = True
    try:
        with region(**settings):
            yield
    finally:
        module.fuse_wgrad_accumulation = before


def _in_8_bits(forward: Callable[..., Any], region: Region) -> Callable[..., Any]:
    @functools.wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with region():
            return forward(*args, **kwargs)

    return inside
