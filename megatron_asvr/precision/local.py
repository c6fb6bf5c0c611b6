"""The layer parts that megatron-core has only in Transformer Engine, written with plain torch.

megatron-core's own "local" layers refuse sequence parallelism (transformer/torch_norm.py:47) and
know one causal mask for all rows, on one rank. Here are a norm that works under sequence
parallelism, and an attention core that takes one dense mask per row, which is what independent
questions about one image and packed documents need, and that knows context parallelism.
"""

from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron-core)

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_asvr.batch import MicroBatch
from megatron_asvr.parallel.collectives import gather_columns
from megatron_asvr.precision import norm
from megatron_asvr.precision.routing import use_router


class RMSNorm(norm.RMSNorm):
    """Root-mean-square norm whose weight carries the mark that sequence parallelism needs.

    Under sequence parallelism a rank's gradient of the weight covers its own positions only;
    megatron-core sums it over the tensor-parallel group for parameters marked
    ``sequence_parallel`` (distributed/finalize_model_grads.py).

    Args:
        config: gives the dtype and whether sequence parallelism is on.
        hidden_size: width that is normalised.
        eps: added to the mean square.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class DenseAttention(MegatronModule):
    """Softmax attention under a dense mask; a core attention of megatron-core's SelfAttention.

    Grouped queries are supported. Under context parallelism the keys and values of all ranks are
    gathered, in rank order; the mask's last axis is in that order. Packed documents are a matter of
    the mask.

    Args:
        config: gives dropout, head width and the parallel degrees.
        layer_number: number of the layer, from 1 (unused).
        softmax_scale: multiplies the scores, default 1 / sqrt(head width).
        pg_collection: holds the context-parallel group.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.cp = pg_collection.cp if config.context_parallel_size > 1 else None
        self.layer_number = layer_number
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale

    def forward(
        self,
        query_SBAC: Tensor,
        key_SBGC: Tensor,
        value_SBGC: Tensor,
        attention_mask: Tensor | None,
        **_: Any,
    ) -> Tensor:
        """Attended values [S, B, A * C]; A and G are this rank's query and key/value heads.

        S counts this rank's columns.

        Args:
            query_SBAC: queries, rotated; C is the width of a head.
            key_SBGC: keys, rotated; G divides A.
            value_SBGC: values.
            attention_mask: [B or 1, 1, S, columns of all ranks]; bool with True = hidden, as
                megatron-core has it, or floating point to be added to the scores. None is plain
                causal.
        """
        if self.cp is not None:
            both = gather_columns(torch.cat([key_SBGC, value_SBGC], -1), group=self.cp)
            key_SBGC, value_SBGC = both.chunk(2, -1)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = ~attention_mask  # torch's convention: True = may attend
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBAC, key_SBGC, value_SBGC))
        out_BASC = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return out_BASC.permute(2, 0, 1, 3).flatten(2)


def attention_rule(batch: MicroBatch, *, sliding_window: int | None) -> Tensor:
    """Which keys are hidden from which of this rank's queries: bool [B, 1, Q, S], True = hidden.

    The rule is that of ``batch.MicroBatch``. A sliding window counts rotary positions, not
    indices, so every branch has its full window. No position is hidden from itself, padding
    included: softmax stays finite.

    Args:
        batch: Q of the S columns of its rows are this rank's.
        sliding_window: positions that a token sees, itself included; None is all.
    """

    def pairs(x_BS: Tensor) -> tuple[Tensor, Tensor]:
        return batch.own(x_BS)[:, :, None], x_BS[:, None, :]

    query, key = pairs(batch.document_BS)
    seen_BQS = query == key
    query, key = pairs(batch.branch_BS)
    seen_BQS &= (key == 0) | (key == query)
    if sliding_window is not None:
        query, key = pairs(batch.position_ids_BS)
        seen_BQS &= query - key < sliding_window
    query, key = pairs(batch.index_BS)
    seen_BQS &= query >= key
    return ~seen_BQS[:, None]


def layer_spec(*, qk_norm: bool, num_experts: int | None) -> ModuleSpec:
    """One transformer layer of megatron-core with the parts of this module.

    Args:
        qk_norm: normalise queries and keys per head.
        num_experts: of a mixture; None is one feed-forward part for every token.
    """
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm", qk_layernorm=qk_norm, num_experts=num_experts
    )
    if num_experts is not None:
        use_router(spec)
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    # megatron-core renames the norms to Transformer Engine's fused names; checkpoints keep ours.
    parts.sharded_state_dict_keys_map = {}
    attention = parts.self_attention.submodules
    attention.core_attention = DenseAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
