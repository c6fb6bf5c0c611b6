"""megatron-core's Transformer Engine linears, norms and attention, for CUDA.

Attention is the THD kind: all rows of a micro-batch are one stream of tokens, and where documents
end says who sees whom. Padding is given to the kernels as the end of its document: it stands behind
the tokens, so none of them sees it, and every position of the output and of the gradients is
written. Told to leave it out, some kernels leave there whatever was in memory, which a weight's
gradient would read; others are not available at all.

Attention here has no form for independent questions about one image, so the data pipeline repeats
the image (``train/assemble.py``). Nothing in this file has run yet.
"""

import functools
from collections.abc import Callable, Mapping
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
from transformer_engine.common.recipe import Float8CurrentScaling

from megatron_asvr.batch import MicroBatch
from megatron_asvr.errors import AsvrError
from megatron_asvr.precision import FUSED_NAMES
from megatron_asvr.precision.fp8.shapes import pad_rows
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
        recipe: of ``precision.fp8.recipe``.
        grouped: what multiplies it together with its neighbours.
    """

    is_on = True

    def __init__(self, name: str, recipe: str, grouped: "GroupedProduct | None" = None) -> None:
        self.name, self.recipe, self.grouped = name, recipe, grouped
        self._linear: te.Linear | None = None

    def __call__(self, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        """The linear's output [M, N].

        Args:
            x_MK: the input, its rows padded.
            weight_NK: the weight.
        """
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
        return Product("probe", "current")(x_MK, weight_NK)


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
    recipe: str,
) -> None:
    """Let the linears of a model chunk multiply in 8 bits, but those that are kept out.

    A forward pass of the chunk is one region of 8 bits, so that the largest values of delayed
    scaling are exchanged once, when it ends; megatron-core's own regions lie inside.

    Args:
        chunk: the model chunk; it is changed.
        names: canonical name of each module by its path.
        decided: for each linear the pattern that keeps it out, or None.
        recipe: of ``precision.fp8.recipe``.
    """
    for path, module in chunk.named_modules():
        if isinstance(module, (te.Linear, te.LayerNormLinear)):
            if decided.get(names[path]) is not None:
                module.forward = _kept_out(module.forward)
        elif isinstance(getattr(module, "fp8", None), dict):
            groups: dict[str, GroupedProduct] = {}
            for slot in module.fp8:
                if decided[f"{names[path]}.{slot}"] is None:
                    matrix = slot.partition(".")[0]
                    kernel = groups.setdefault(matrix, GroupedProduct(recipe))
                    module.fp8[slot] = Product(f"{names[path]}.{slot}", recipe, kernel)
        elif names[path] in decided and decided[names[path]] is None:
            module.fp8 = Product(names[path], recipe)
    chunk.forward = _in_8_bits(chunk.forward, chunk.config)


def _kept_out(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def in_full(*args: Any, **kwargs: Any) -> Any:
        with te.autocast(enabled=False):
            return forward(*args, **kwargs)

    return in_full


def _in_8_bits(forward: Callable[..., Any], config: TransformerConfig) -> Callable[..., Any]:
    @functools.wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with get_fp8_context(config):
            return forward(*args, **kwargs)

    return inside
