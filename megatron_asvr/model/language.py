"""The causal language model on megatron-core: Llama, Mistral, Qwen and mixture settings.

``LanguageModel`` is a GPTModel whose three steps are called separately: tokens to embeddings,
embeddings to hidden states, hidden states to logits. Between the first two the image features are
spliced in; before the last one the positions that have a target are selected, so that the
vocabulary is never multiplied with an image position. Rotary positions and the attention mask are
inputs: documents and branches restart their positions and do not see one another.
"""

import logging
import math
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron-core)

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_asvr import platforms, precision
from megatron_asvr.batch import MicroBatch
from megatron_asvr.config.schema import LanguageConfig, PrecisionConfig
from megatron_asvr.errors import AsvrError
from megatron_asvr.model import rope, sharding
from megatron_asvr.model.loss import summed_cross_entropy
from megatron_asvr.model.megatron_config import transformer_config
from megatron_asvr.model.output_loss import OutputLayer, output_loss
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.precision.fp8.product import linear

VOCAB_MULTIPLE = 64  # the padded vocabulary is the same for every tensor-parallel degree up to 64
MASKED_LOGIT = -1e30  # exp() of it is exactly 0, and no difference of two logits overflows
RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "linear_fc2.weight")


def _known(record: logging.LogRecord) -> bool:
    """Everything but 0.19.2's notice, at each start, that GPTModel has a successor."""
    return not record.getMessage().startswith("GPTModel IS DEPRECATED")


logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(_known)


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding over all ranks: ``vocab_size`` rounded up so that ``tp`` divides it."""
    multiple = math.lcm(VOCAB_MULTIPLE, tp)
    return -(-vocab_size // multiple) * multiple


def gather_positions(hidden_SBH: Tensor, *, groups: Groups) -> Tensor:
    """Hidden states of all positions from what ``LanguageModel.forward`` gave on this rank.

    Args:
        hidden_SBH: this rank's part of them under sequence parallelism, else all already.
        groups: process groups of the layout.
    """
    if not groups.plan.sp:
        return hidden_SBH
    # What follows computes the full gradient on every rank, so the backward only splits.
    return gather_from_sequence_parallel_region(
        hidden_SBH, tensor_parallel_output_grad=False, group=groups.tp
    )


class LanguageModel(GPTModel):
    """A pipeline stage of the language model; its parameters are uninitialised.

    Args:
        config: the language model.
        groups: process groups and this rank's place in them.
        dtype: of the parameters and the computation, float32 or bfloat16.
        pre_process: this stage holds the embedding.
        post_process: this stage holds the final norm and the output layer.
        vp_stage: model chunk under virtual pipeline stages.
        recompute: what the backward pass computes again, see ``transformer_config``.
        settings: which implementation computes the layers.
    """

    def __init__(
        self,
        config: LanguageConfig,
        *,
        groups: Groups,
        dtype: torch.dtype,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        recompute: str = "none",
        settings: PrecisionConfig | None = None,
    ) -> None:
        platform = platforms.select()[0]
        settings = settings or PrecisionConfig()
        megatron_config = transformer_config(
            config, groups.plan, dtype, recompute=recompute, settings=settings
        )
        backend, reason = precision.select_backend(platform, dtype, settings)
        super().__init__(
            megatron_config,
            precision.block_spec(megatron_config, backend, vp_stage=vp_stage),
            padded_vocab_size(config.vocab_size, groups.plan.tp),
            config.max_positions,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=config.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=config.rope_theta,
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
        )
        self.language_config = config
        self.groups = groups
        self.backend, self.backend_reason = backend, reason
        if post_process:
            self.output_layer.fp8 = None
        self.to(platform.device)
        sharding.mark_parallel_linears(self)
        for name, parameter in self.named_parameters():
            if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                sharding.mark(parameter, dim=0, full_size=config.vocab_size)
            elif name.endswith("mlp.linear_fc1.weight"):
                sharding.mark(parameter, dim=0, blocks=2)
            elif ".experts." in name:
                sharding.mark_expert(parameter)

    def _is_in_embd_group(self) -> bool:
        """Never: the two copies of a tied weight need no exchange to start equal.

        megatron-core would exchange them on the first and the last stage only, and the LM head may
        end an earlier one. Both copies are drawn or loaded under one name.
        """
        return False

    def init_std(self, name: str) -> float:
        """Standard deviation that the matrix called ``name`` is initialised with.

        The two linears that write to the residual stream are scaled down with depth.
        """
        std = self.language_config.init_std
        if name.endswith(RESIDUAL_OUTPUTS):
            return std / math.sqrt(2 * self.language_config.num_layers)
        return std

    def mask(self, batch: MicroBatch) -> Tensor:
        """Who attends to whom in a micro-batch, in the form that this backend's attention takes.

        Args:
            batch: of this rank.
        """
        return precision.attention_rule(
            batch, self.backend, sliding_window=self.language_config.sliding_window
        )

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """Embeddings [S, B, H] of all given positions, on every rank; first stage only.

        Args:
            tokens_BS: int64 token ids below the vocabulary size.
        """
        return self.embedding(input_ids=tokens_BS, position_ids=None)

    def rotary(self, position_ids_BS: Tensor) -> Tensor:
        """Rotary angles, float32 [S, B, 1, head width], in radians.

        Args:
            position_ids_BS: int, rotary position of each position.
        """
        frequency = rope.frequencies(self.language_config, position_ids_BS.device)
        angle_SB = position_ids_BS.t().float()[..., None] * frequency
        return torch.cat([angle_SB, angle_SB], -1)[:, :, None]

    def forward(
        self,
        embeds_SBH: Tensor | None,
        position_ids_BS: Tensor,
        mask: Tensor,
        padding_BS: Tensor | None = None,
    ) -> Tensor:
        """Hidden states: after the final norm on the stage that has it, before it on the others.

        S counts the columns of this context-parallel rank.

        Args:
            embeds_SBH: embeddings, the same on every rank of the tensor-parallel group; None on
                later stages (see ``set_input_tensor``).
            position_ids_BS: int64, rotary position of each position.
            mask: from ``mask``.
            padding_BS: bool, True where there is no document, which a mixture's load-balancing loss
                does not count; without it there is no such loss.

        Returns:
            [S, B, H]; under sequence parallelism this rank's part of the positions
            (see ``gather_positions``).

        Raises:
            AsvrError: sequence parallelism, and the tensor-parallel degree does not divide S.
        """
        plan = self.groups.plan
        num_positions = position_ids_BS.shape[1]
        if plan.sp and num_positions % plan.tp:
            raise AsvrError(
                f"sequence parallelism splits {num_positions} positions over parallel.tp={plan.tp} "
                f"ranks; pad the batch to a multiple of {plan.tp}"
            )
        if padding_BS is not None and plan.sp:
            padding_BS = padding_BS.chunk(plan.tp, 1)[self.groups.tp_rank]
        if self.pre_process and plan.sp:
            embeds_SBH = scatter_to_sequence_parallel_region(embeds_SBH, group=self.groups.tp)
        return self.decoder(
            hidden_states=embeds_SBH,
            attention_mask=mask,
            rotary_pos_emb=self.rotary(position_ids_BS),
            padding_mask=padding_BS,
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """megatron-core's, but every expert's matrix is a tensor of its own, by canonical name.

        megatron-core stores all experts of a layer as one tensor, in halves. Experts are whole on
        their ranks, so nothing has to be cut.

        Args:
            prefix: put before every key.
            sharded_offsets: as in megatron-core.
            metadata: as in megatron-core.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        names = sharding.canonical_names(self, prefix=prefix)
        for local, parameter in self.named_parameters():
            if sharding.is_expert(parameter):
                state[prefix + local] = ShardedTensor.from_rank_offsets(
                    names[local],
                    parameter,
                    *sharded_offsets,
                    replica_id=(0, 0, self.groups.expert_dp.rank()),
                    prepend_axis_num=len(sharded_offsets),
                )
        return state

    def logits(self, hidden_XH: Tensor) -> Tensor:
        """This rank's shard of the logits, float32 [X, padded vocabulary / tp]; last stage only.

        The columns beyond the vocabulary hold ``MASKED_LOGIT``.

        Args:
            hidden_XH: final hidden states of any positions, the same on every rank of the group;
                leading dimensions are free.
        """
        weight_VH = self._output_weight()
        hidden_XH = copy_to_tensor_model_parallel_region(hidden_XH, group=self.groups.tp)
        logits_XV = linear(hidden_XH, weight_VH, None, self.output_layer.fp8).float()
        num_rows = weight_VH.shape[0]
        num_real = self.language_config.vocab_size - self.groups.tp_rank * num_rows
        if num_real < num_rows:
            # Unseen by autograd on purpose: the softmax of these columns, and with it their
            # gradient, is exactly 0.
            with torch.no_grad():
                logits_XV[..., max(0, num_real) :].fill_(MASKED_LOGIT)
        return logits_XV

    def loss(
        self, hidden_XH: Tensor, targets_X: Tensor, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy and targets on top, [1] each; last stage only. See ``output_loss``.

        Args:
            hidden_XH: final hidden states of the positions that have a target, the same on every
                rank of the group; X may be 0.
            targets_X: int64 token ids.
            scale: the gradient that the sum will get, where it is known.
        """
        tp = self.groups.tp
        if self.output_layer.fp8 is not None:
            return summed_cross_entropy([self.logits(hidden_XH)], targets_X[:, None], tp=tp)
        weight_VH = self._output_weight()
        first = self.groups.tp_rank * len(weight_VH)
        layer = OutputLayer(weight_VH, None, first, self.language_config.vocab_size)
        entered_XH = copy_to_tensor_model_parallel_region(hidden_XH, group=tp)
        # The gradient of a tied weight is added up with the embedding's before it is stored.
        known = scale is not None and not self.share_embeddings_and_output_weights
        scales = [scale] if known else None
        return output_loss(entered_XH[None], [layer], targets_X[:, None], tp=tp, scales=scales)

    def _output_weight(self) -> Tensor:
        """This rank's rows of the output layer [padded vocabulary / tp, H]."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def logits_full(self, hidden_XH: Tensor) -> Tensor:
        """The logits of the whole vocabulary, float32 [X, T], on every rank; last stage only.

        Args:
            hidden_XH: final hidden states of any positions, the same on every rank of the group;
                leading dimensions are free.
        """
        logits_XV = gather_from_tensor_model_parallel_region(
            self.logits(hidden_XH), group=self.groups.tp
        )
        return logits_XV[..., : self.language_config.vocab_size]
