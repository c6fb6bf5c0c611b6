"""megatron-core's Transformer Engine linears, norms and attention, for CUDA.

Attention is the THD kind: all rows of a micro-batch are one stream of tokens, and where documents
end says who sees whom. Padding is given to the kernels as the end of its document: it stands behind
the tokens, so none of them sees it, and every position of the output and of the gradients is
written. Told to leave it out, some kernels leave there whatever was in memory, which a weight's
gradient would read; others are not available at all.

Attention here has no form for independent questions about one image, so the data pipeline repeats
the image (``train/assemble.py``). Nothing in this file has run yet.
"""

from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron-core)

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_asvr.batch import MicroBatch
from megatron_asvr.errors import AsvrError
from megatron_asvr.precision import FUSED_NAMES
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
