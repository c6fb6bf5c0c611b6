"""The model: encoder, projector, language model and visual head, from micro-batch to loss sums.

The first pipeline stage encodes images and splices them into the token embeddings, the last one
computes both losses; or it holds the visual head alone (``ParallelPlan.head_alone``), and the stage
before computes the text loss. Every rank of a tensor- and context-parallel group encodes its own
share of the images (model/images.py), so no image is encoded twice, and the gradients of a trained
encoder are partial (``partial_grad_parameters``). Under context parallelism a rank projects the
patches and computes the losses of its own columns; megatron-core sums gradients over those ranks
together with the data-parallel ones.

A micro-batch without images or without text targets runs the same operations on empty tensors:
no rank waits for a collective that another one skipped, and every trained parameter always
receives a gradient, if only zero.
"""

import copy
from collections.abc import Iterator
from typing import Any

from megatron_asvr.platforms import kernels, mcore  # noqa: F401  (mcore prepares the process)

import torch
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import (
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
)
from torch import Tensor, nn

from megatron_asvr import platforms
from megatron_asvr.batch import MicroBatch
from megatron_asvr.config.schema import PARTS, Config
from megatron_asvr.errors import ConfigError
from megatron_asvr.model import sharding
from megatron_asvr.model.fusion import splice_images, take_positions
from megatron_asvr.model.images import ImageReader
from megatron_asvr.model.language import LanguageModel, gather_positions
from megatron_asvr.model.linears import in_8_bits
from megatron_asvr.model.loss import LossSums, Scales
from megatron_asvr.model.megatron_config import transformer_config
from megatron_asvr.model.projector import Projector
from megatron_asvr.model.tokenizer import VisualTokenizer
from megatron_asvr.model.vision import SiglipEncoder
from megatron_asvr.model.visual_head import VisualHead
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.precision.fp8.product import multiply_by_ours
from megatron_asvr.precision.fp8.watched import Watched

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class AsvrModel(MegatronModule):
    """A pipeline stage of the model.

    Args:
        config: the run.
        groups: process groups and this rank's place in them.
        tokenizer: the frozen visual tokenizer; its codebooks feed the visual head, and with
            ``data.codes=online`` it encodes the images too. None when the visual loss is off.
        vp_stage: model chunk under virtual pipeline stages.

    Attributes:
        pre_process: this stage embeds tokens and images.
        post_process: this stage ends the language model and computes the text loss.
        visual_process: this stage is the last and computes the visual loss, if there is one.
        images: gives features and codes.

    Raises:
        ConfigError: a visual loss without a tokenizer, or sizes that do not fit.
    """

    def __init__(
        self,
        config: Config,
        *,
        groups: Groups,
        tokenizer: VisualTokenizer | None,
        vp_stage: int | None = None,
    ) -> None:
        dtype = DTYPES[config.train.precision]
        model, device = config.model, platforms.select()[0].device
        own = transformer_config(model.language, groups.plan, dtype, settings=config.precision)
        super().__init__(config=own)
        self.run_config = config
        self.groups = groups
        self.watched: Watched | None = None
        is_last = vp_stage in (None, (groups.plan.vpp or 1) - 1)
        self.pre_process = groups.is_first_stage and not vp_stage
        self.post_process = groups.has_text_loss and is_last
        self.visual_process = groups.is_last_stage and is_last
        self.vp_stage = vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.official = config.loss.mode == "official"
        tp = groups.tp if groups.plan.tp > 1 else None
        self.tp = tp
        if self.pre_process:
            self.vision_encoder = SiglipEncoder(model.vision).to(device, dtype)
            self.projector = Projector(model, tp=tp, dtype=dtype).to(device)
        self.language_model: LanguageModel | None = None
        if not (groups.plan.head_alone and self.visual_process):
            self.language_model = LanguageModel(
                model.language,
                groups=groups,
                dtype=dtype,
                pre_process=self.pre_process,
                post_process=self.post_process,
                vp_stage=vp_stage,
                recompute=config.train.recompute,
                settings=config.precision,
            )
        self._received: Tensor | None = None  # by a stage without a language model
        self.visual_head: VisualHead | None = None
        online = None
        if config.loss.visual_weight and self.visual_process:
            tables = _checked(tokenizer, config).codebooks.tables()
            head = VisualHead(
                model.visual_head,
                model.language.hidden_size,
                tables,
                tp=tp,
                dtype=dtype,
                recompute=config.train.recompute_visual_head,
            )
            self.visual_head = head.to(device)
            online = tokenizer.to(device) if config.data.codes == "online" else None
        # Known on every stage: sums are added up over all ranks.
        visual = config.loss.visual_weight and tokenizer is not None
        self.num_depths = len(tokenizer.codebook_sizes) if visual else 0
        self.images = ImageReader(
            config,
            groups=groups,
            encoder=self.vision_encoder if self.pre_process else None,
            tokenizer=online,
        )
        self._freeze(config.train.trainable)

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        """Whether embedding and output layer are one tensor (megatron-core asks)."""
        return self.run_config.model.language.tied_embeddings

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight (megatron-core asks, to sum its gradients over stages)."""
        return self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take what the stage before sent."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        if self.language_model is None:
            self._received = input_tensor
        else:
            self.language_model.set_input_tensor(input_tensor)

    def parts(self) -> dict[str, nn.Module]:
        """The parts that this stage holds, by the names that ``train.trainable`` uses."""
        found = {name: getattr(self, name, None) for name in PARTS}
        return {name: part for name, part in found.items() if part is not None}

    def partial_grad_parameters(self) -> list[nn.Parameter]:
        """Trained parameters whose gradients must be summed over the tensor-parallel group.

        Each rank encodes only its share of the images, so a trained encoder's gradients are
        partial; those of every other replicated parameter are already the same on all ranks.
        """
        if self.tp is None or not self.pre_process:
            return []
        return [x for x in self.vision_encoder.parameters() if x.requires_grad]

    def compile_layers(self) -> None:
        """Let torch compile what megatron-core does not: layers of the encoder, and of the head.

        One by one, since they are alike: torch then compiles one for all.
        """
        if self.pre_process and not self.vision_encoder.is_graphed:
            for layer in self.vision_encoder.encoder.layers:
                layer.compile()
        if self.visual_head is not None:
            for layer in self.visual_head.layers:
                layer.compile()

    def init_std(self, name: str) -> float:
        """Standard deviation that the matrix with this canonical name is initialised with."""
        part, _, rest = name.partition(".")
        model = self.run_config.model
        if part == "language_model":
            return self.language_model.init_std(rest)
        own = {"vision_encoder": model.vision, "visual_head": model.visual_head}
        return own.get(part, model.language).init_std

    def encode_images(self, batch: MicroBatch) -> Tensor:
        """Encoder features [I, N, F] of all images, on every rank of the group.

        Args:
            batch: holds this rank's share of the pixels.
        """
        return self.images.features(batch)

    def leave_out_unused(self) -> int:
        """Number of parameters of this stage that are given up, since no pass reads them."""
        return self.vision_encoder.leave_out_unused() if self.pre_process else 0

    def embeddings(self, batch: MicroBatch, features_PF: Tensor | None = None) -> Tensor:
        """Token embeddings of this rank's columns with the image features in place, [S, B, H].

        Args:
            batch: one micro-batch.
            features_PF: encoder features of all its patches where they are known already.
        """
        if features_PF is None:
            features_PF = self.encode_images(batch).flatten(0, 1)
        embeds_PH = self.projector(features_PF[batch.image_patches_P])
        images = self.projector.with_newlines(embeds_PH, batch)
        return splice_images(self.language_model.embed(batch.tokens_BS), *images)

    def hidden(self, batch: MicroBatch, features_PF: Tensor | None = None) -> Tensor:
        """What this stage's layers give: where a loss is computed the final hidden states.

        Args:
            batch: one micro-batch.
            features_PF: encoder features of all its patches where they are known already.

        Returns:
            [S, B, H]; under sequence parallelism this rank's part of the positions.
        """
        if self.language_model is None:
            return self._received
        embeds_SBH = self.embeddings(batch, features_PF) if self.pre_process else None
        return self.language_model(
            embeds_SBH,
            batch.own(batch.position_ids_BS),
            self.language_model.mask(batch),
            batch.own(batch.document_BS) < 0,
        )

    def forward(
        self, batch: MicroBatch, *, scales: Scales | None = None
    ) -> LossSums | Tensor | tuple[Tensor, LossSums]:
        """Loss sums on the last stage, hidden states for the next stage on the others.

        Both of them on a stage before the last that computes the text loss. Either kind of sums is
        zero where the other stage computes it.

        Args:
            batch: one micro-batch, on this rank's device.
            scales: the gradients that the sums will get in a backward pass that must follow; some
                gradients of weights are then added to their buffers now (see ``output_loss``).
        """
        features_PF = None
        if self.images.joins(batch):
            batch = copy.copy(batch)  # with what the host knows of it already
            features_PF, batch.codes_PD = self.images.both(batch)
        hidden_SBH = self.hidden(batch, features_PF)
        if not (self.post_process or self.visual_process):
            return hidden_SBH
        whole_SBH = gather_positions(hidden_SBH, groups=self.groups)
        text = self._text(whole_SBH, batch, scales and scales.text)
        visual = self._visual(whole_SBH, batch, scales and scales.visual_D)
        sums = LossSums(**text, **visual)
        return sums if self.visual_process else (hidden_SBH, sums)

    def _text(self, hidden_SBH: Tensor, batch: MicroBatch, scale: float | None) -> dict[str, Any]:
        """The text part of ``LossSums``, from the final hidden states of all positions."""
        if not self.post_process:
            # A gradient of zero all the same: the stage before waits for it.
            none = hidden_SBH.flatten()[:0].float().sum()
            return {"text_sum": none, "text_count": 0, "text_correct": none.detach().long()}
        positions_X = batch.text_positions_X
        (text_sum,), (text_correct,) = self.language_model.loss(
            take_positions(hidden_SBH, positions_X, may_be_cut=False),
            batch.text_targets_BS.flatten()[positions_X],
            scale,
        )
        return {
            "text_sum": text_sum,
            "text_count": positions_X.numel(),
            "text_correct": text_correct,
        }

    def _visual(
        self, hidden_SBH: Tensor, batch: MicroBatch, scales_D: list[float] | None
    ) -> dict[str, Any]:
        """The visual part of ``LossSums``, from the final hidden states of all positions."""
        if self.visual_head is None:
            none_D = hidden_SBH.new_zeros(self.num_depths, dtype=torch.float32)
            return {
                "visual_sum_D": none_D,
                "visual_count": 0,
                "visual_correct_D": none_D.long(),
                "codes_MD": None,
            }
        hidden_MH = take_positions(hidden_SBH, batch.visual_positions_M, may_be_cut=self.official)
        codes_MD = self.images.codes(batch)[batch.visual_patches_M]
        visual_sum_D, visual_correct_D = self.visual_head.loss(hidden_MH, codes_MD, scales_D)
        return {
            "visual_sum_D": visual_sum_D,
            "visual_count": batch.num_visual_targets,
            "visual_correct_D": visual_correct_D,
            "codes_MD": codes_MD,
            "visual_scale": batch.visual_scale,
        }

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple = (),
        metadata: dict | None = None,
    ) -> dict[str, Any]:
        """This stage's parameters for megatron-core's checkpoints, under canonical names.

        Args:
            prefix: put before every key.
            sharded_offsets: as in megatron-core.
            metadata: as in megatron-core; passed on to the language model.
        """
        state = {}
        if self.language_model is not None:
            state = self.language_model.sharded_state_dict(
                f"{prefix}language_model.", sharded_offsets, metadata
            )
        groups = {"tp_group": self.groups.tp, "dp_cp_group": self.groups.dp_cp}
        for name, parameter in self._own_parameters():
            key = prefix + name
            if getattr(parameter, "tensor_model_parallel", False):
                state[key] = make_tp_sharded_tensor_for_checkpoint(
                    parameter,
                    key,
                    parameter.partition_dim,
                    prepend_offsets=sharded_offsets,
                    # codewords are padded to a multiple of the degree: lengths differ by layout
                    allow_shape_mismatch=parameter.asvr_full_size is not None,
                    **groups,
                )
            else:
                state[key] = make_sharded_tensor_for_checkpoint(
                    parameter, key, prepend_offsets=sharded_offsets, **groups
                )
        return state

    def _own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters outside the language model."""
        for part, module in self.parts().items():
            if part != "language_model":
                for name, parameter in module.named_parameters():
                    yield f"{part}.{name}", parameter

    def _freeze(self, trainable: tuple[str, ...]) -> None:
        """Set which parameters train; what the forward pass never reads does not."""
        for name, part in self.parts().items():
            part.requires_grad_(name in trainable)
        if self.pre_process:
            for parameter in self.vision_encoder.unused_parameters():
                parameter.requires_grad_(False)


def build_chunks(
    config: Config, *, groups: Groups, tokenizer: VisualTokenizer | None
) -> list[AsvrModel]:
    """This rank's part of the model with weights drawn from ``run.seed``, on its device.

    One stage of the model, or under virtual pipeline stages ``parallel.vpp`` of them. The weights
    are the same in every layout. Sources of ``config.init`` are loaded over them by the caller.

    Args:
        config: the run.
        groups: process groups of the layout.
        tokenizer: see ``AsvrModel``.
    """
    kernels.use(config.precision.kernels)
    vpp = groups.plan.vpp
    chunks = [
        AsvrModel(config, groups=groups, tokenizer=tokenizer, vp_stage=number if vpp else None)
        for number in range(vpp or 1)
    ]
    for chunk in chunks:
        sharding.seeded_init(chunk, config.run.seed, groups=groups, std=chunk.init_std)
        if groups.plan.tp == 1 and platforms.select()[0].name == "cpu":
            multiply_by_ours(chunk)
        chunk.watched = in_8_bits(chunk, config, groups=groups, tokenizer=tokenizer)
        if config.train.cuda_graphs:
            chunk.images.graph()
        if config.train.compile:
            chunk.compile_layers()
    return chunks


def build_model(config: Config, *, groups: Groups, tokenizer: VisualTokenizer | None) -> AsvrModel:
    """The whole model where it is not cut into stages; see ``build_chunks``."""
    (model,) = build_chunks(config, groups=groups, tokenizer=tokenizer)
    return model


def _checked(tokenizer: VisualTokenizer | None, config: Config) -> VisualTokenizer:
    """The tokenizer, after checking that there is one and that it fits the encoder."""
    if tokenizer is None:
        raise ConfigError(
            f"loss.visual_weight={config.loss.visual_weight} needs model.visual_tokenizer; fit one "
            "with `asvr tokenizer fit`, or set loss.visual_weight=0 for the text-only baseline"
        )
    tokenizer.check_fits(config.model.vision)
    return tokenizer
