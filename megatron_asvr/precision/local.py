"""The layer parts that megatron-core has only in Transformer Engine, written with plain torch.

megatron-core's own "local" layers refuse sequence parallelism (transformer/torch_norm.py:47) and
know one causal mask for all rows, on one rank. Here are a norm that works under sequence
parallelism, and an attention core that computes documents one by one, or takes one dense mask per
row, which is what independent questions about one image need, and that knows context parallelism.
Rotation and the gated activation are one node of the graph each, and what a linear keeps of them
is made again for the backward pass (docs/performance.md has the cost of both).
"""

from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron-core)

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_asvr.batch import MicroBatch
from megatron_asvr.parallel.collectives import gather_columns
from megatron_asvr.precision import norm
from megatron_asvr.precision.nodes import gated, rotated
from megatron_asvr.precision.remake import remade, remember
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


class LocalSelfAttention(SelfAttention):
    """megatron-core's, with queries, keys and values rotated and told apart in one node."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, *, rotary_pos_emb: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Output of the layer's attention [S, B, H], and its bias.

        Args:
            hidden_states: [S, B, H], after the norm.
            attention_mask: from ``attention_rule``.
            rotary_pos_emb: angles [S, B, 1, C] in radians.
        """
        groups = self.num_query_groups_per_partition
        each = self.num_attention_heads_per_partition // groups  # queries of a group
        angle_SBC = rotary_pos_emb.squeeze(2)
        with remade(hidden_states):
            mixed, _ = self.linear_qkv(hidden_states)
        mixed_SBGNC = mixed.view(*mixed.shape[:2], groups, each + 2, -1)
        if self.config.qk_layernorm:
            query, key, value = mixed_SBGNC.split((each, 1, 1), -2)
            query, _ = rotated(self.q_layernorm(query), angle_SBC, sizes=(each, 0))
            key, _ = rotated(self.k_layernorm(key), angle_SBC, sizes=(1, 0))
        else:
            query, key, value = rotated(mixed_SBGNC, angle_SBC, sizes=(each, 1, 1))
        three = (query.flatten(2, 3), key.squeeze(3), value.squeeze(3))
        if self.checkpoint_core_attention and self.training:
            attended = self._checkpointed_attention_forward(*three, attention_mask)
        else:
            attended = self.core_attention(*three, attention_mask)
        with remade(attended):
            return self.linear_proj(attended)


class GatedMLP(MLP):
    """megatron-core's, with the gated activation in one node; for layers without experts.

    Args:
        config: gives the sizes.
        pg_collection: holds the tensor-parallel group; megatron-core 0.16 has only the global one.
    """

    def __init__(self, config: TransformerConfig, pg_collection: Any = None, **_: Any) -> None:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        super().__init__(
            config,
            linears,
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=getattr(pg_collection, "tp", None),
        )

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        """Output [S, B, H], and its bias.

        Args:
            hidden_states: [S, B, H], after the norm.
        """
        with remade(hidden_states):
            both, _ = self.linear_fc1(hidden_states)
        inner = gated(both)
        with remade(inner):
            return self.linear_fc2(inner)


class DenseAttention(MegatronModule):
    """Softmax attention of documents or under a dense mask; a core attention of SelfAttention.

    Grouped queries are supported. Under context parallelism the keys and values of all ranks are
    gathered, in rank order; the mask's last axis is in that order.

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
            attention_mask: of ``attention_rule``: lengths of documents, int64 [B, n]; or
                [B or 1, 1, S, columns of all ranks], bool with True = hidden, or floating point to
                be added to the scores. None is plain causal.
        """
        if attention_mask is not None and attention_mask.dtype == torch.int64:
            return self._documents((query_SBAC, key_SBGC, value_SBGC), attention_mask)
        if self.cp is not None:
            both = gather_columns(torch.cat([key_SBGC, value_SBGC], -1), group=self.cp)
            key_SBGC, value_SBGC = both.chunk(2, -1)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = ~attention_mask  # torch's convention: True = may attend
        three = (x.permute(1, 2, 0, 3) for x in (query_SBAC, key_SBGC, value_SBGC))
        return self._attend(*three, attention_mask).permute(2, 0, 1, 3).flatten(2)

    def _documents(self, three: tuple[Tensor, Tensor, Tensor], lengths_Bn: Tensor) -> Tensor:
        """Every document of every row alone: none sees another, and half of its pairs are left."""
        rows: list[list[Tensor]] = []
        for row, lengths in enumerate(lengths_Bn.tolist()):
            parts = (x[:, row].split([n for n in lengths if n]) for x in three)
            documents = (
                [x.transpose(0, 1)[None] for x in document] for document in zip(*parts, strict=True)
            )
            outs = [self._attend(*document, None)[0].transpose(0, 1) for document in documents]
            rows.append(outs)
        kept = [[out.detach() for out in outs] for outs in rows]  # by attention itself
        return remember(_joined(rows), lambda: _joined(kept))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[B, A, S, C] from tensors of that shape; without a mask causal."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )


def _joined(rows: list[list[Tensor]]) -> Tensor:
    """[S, B, A * C] from each row's documents, [its columns, A, C]."""
    return torch.stack([torch.cat(outs) for outs in rows], 1).flatten(2)


def attention_rule(batch: MicroBatch, *, sliding_window: int | None) -> Tensor:
    """Who sees whom: lengths of documents where that says it all, otherwise a dense mask.

    Lengths, int64 [B, n] with zeros at the end, add up to the columns of a row: documents lie one
    after the other, padding like one more, and a position sees those before it. Dense: which keys
    are hidden from which of this rank's queries, bool [B, 1, Q, S], True = hidden.

    The rule is that of ``batch.MicroBatch``. A sliding window counts rotary positions, not
    indices, so every branch has its full window. No position is hidden from itself, padding
    included: softmax stays finite.

    Args:
        batch: Q of the S columns of its rows are this rank's.
        sliding_window: positions that a token sees, itself included; None is all.
    """
    known_Bn = batch.document_lengths_Bn
    lengths_Bn = batch.host_lengths() if known_Bn is None else known_Bn
    if len(lengths_Bn) and (sliding_window is None or lengths_Bn.max() <= sliding_window):
        return lengths_Bn
    return dense_rule(batch, sliding_window=sliding_window)


def dense_rule(batch: MicroBatch, *, sliding_window: int | None) -> Tensor:
    """The dense mask of ``attention_rule``, with the same arguments."""

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
    parts = spec.submodules
    if num_experts is not None:
        use_router(spec)
    else:
        parts.mlp = GatedMLP
    parts.self_attention.module = LocalSelfAttention
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    # megatron-core renames the norms to Transformer Engine's fused names; checkpoints keep ours.
    parts.sharded_state_dict_keys_map = {}
    attention = parts.self_attention.submodules
    attention.core_attention = DenseAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec
