"""Small language models and one-rank process groups for the tests of several packages."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron)

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_asvr.batch import MicroBatch
from megatron_asvr.config.schema import LanguageConfig
from megatron_asvr.model import sharding
from megatron_asvr.model.language import LanguageModel, gather_positions
from megatron_asvr.parallel import groups as process_groups
from megatron_asvr.parallel.collectives import broadcast_tensor
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.plan import ParallelPlan

SMALL = LanguageConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_hidden_size=48,
    vocab_size=301,  # neither a multiple of 2 nor of the padding
    init_std=0.2,  # large enough for attention to be far from uniform
)
CASES = {
    "llama": SMALL,
    "llama_tied_no_gqa": dataclasses.replace(SMALL, tied_embeddings=True, num_kv_heads=None),
    "mistral": dataclasses.replace(SMALL, family="mistral", sliding_window=5, rope_theta=1e6),
    "qwen2": dataclasses.replace(SMALL, family="qwen2", tied_embeddings=True),
    "qwen3": dataclasses.replace(SMALL, family="qwen3", head_dim=12, norm_eps=1e-5),
}
MIXTURES = {
    "mixtral": dataclasses.replace(SMALL, family="mixtral", num_experts=4, experts_per_token=2),
    "qwen3_moe": dataclasses.replace(
        SMALL,
        family="qwen3_moe",
        head_dim=12,
        num_experts=6,
        experts_per_token=3,
        expert_ffn_hidden_size=20,
    ),
    "qwen3_moe_unnormalised": dataclasses.replace(
        SMALL, family="qwen3_moe", num_experts=4, experts_per_token=1, norm_topk_prob=False
    ),
}


@contextlib.contextmanager
def one_rank() -> Iterator[Groups]:
    """Process groups of a world of one, taken down afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield process_groups.initialize(ParallelPlan(), 60.0)
        finally:
            process_groups.destroy()
            dist.destroy_process_group()


def build(
    config: LanguageConfig,
    groups: Groups,
    *,
    dtype: torch.dtype = torch.float32,
    vp_stage: int = 0,
) -> LanguageModel:
    """This rank's part of a language model; every weight, norm and bias is drawn from a seed."""
    virtual = groups.plan.vpp is not None
    model = LanguageModel(
        config,
        groups=groups,
        dtype=dtype,
        pre_process=groups.is_first_stage and vp_stage == 0,
        post_process=groups.is_last_stage and vp_stage == (groups.plan.vpp or 1) - 1,
        vp_stage=vp_stage if virtual else None,
    )
    sharding.seeded_init(model, 5, groups=groups, std=model.init_std)
    vectors = {name: vector(name, x) for name, x in full_vectors(model, groups).items()}
    sharding.load_weights(model, vectors.get, groups=groups, strict=False)
    return model


def full_vectors(model: LanguageModel, groups: Groups) -> dict[str, tuple[int, ...]]:
    """Full shapes of the norms and biases, which the initialisation leaves at one and zero."""
    names = sharding.canonical_names(model)
    shapes = {n: sharding.full_shape(p, groups=groups) for n, p in model.named_parameters()}
    return {names[n]: shape for n, shape in shapes.items() if len(shape) == 1}


def vector(name: str, shape: tuple[int, ...]) -> Tensor:
    """Values around the usual ones that depend on the name only."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return float(name.endswith("norm.weight")) + 0.3 * torch.randn(shape, generator=generator)


def plain_batch(tokens_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Document, branch and position ids of rows that are one document each."""
    zeros_BS = torch.zeros_like(tokens_BS, dtype=torch.int32)
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    return zeros_BS, zeros_BS, positions_BS


def hidden(
    model: LanguageModel,
    tokens_BS: Tensor,
    document_BS: Tensor,
    branch_BS: Tensor,
    position_ids_BS: Tensor,
) -> Tensor:
    """Final hidden states [S, B, H] of a one-stage model."""
    mask = model.mask(rule_batch(document_BS, branch_BS, position_ids_BS))
    return model(model.embed(tokens_BS), position_ids_BS, mask)


def rule_batch(document_BS: Tensor, branch_BS: Tensor, position_ids_BS: Tensor) -> MicroBatch:
    """A micro-batch of which only the attention rule matters."""
    none = torch.empty(0, dtype=torch.int64)
    return MicroBatch(
        tokens_BS=None,
        text_targets_BS=None,
        position_ids_BS=position_ids_BS,
        document_BS=document_BS,
        branch_BS=branch_BS,
        index_BS=torch.arange(document_BS.shape[1]).expand_as(document_BS),
        image_positions_P=none,
        image_patches_P=none,
        pixel_values_ICHW=None,
        image_share=(0, 0),
        num_images=0,
        visual_positions_M=none,
        visual_patches_M=none,
        codes_PD=None,
        sample_ids=[],
    )


def from_last_stage(
    model: nn.Module,
    forward: Callable[[Any], tuple[Tensor, Tensor | None]],
    *,
    batch: int,
    length: int,
    groups: Groups,
) -> Tensor:
    """What the last stage finds, on every rank.

    Args:
        model: this rank's stage.
        forward: from the stage to what it sends on and, on the last stage, what is wanted.
        batch: samples.
        length: positions of each.
        groups: process groups of the layout.
    """
    found: list[Tensor] = []

    def forward_step(_: Any, stage: nn.Module) -> tuple[Tensor, Any]:
        sent, wanted = forward(stage)
        if wanted is not None:
            found.append(wanted)
        return sent, lambda x: (x.sum(), torch.tensor(1, dtype=torch.int), {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=[model],
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=batch,
        decoder_seq_length=length,
        forward_only=True,
    )
    return broadcast_tensor(found[0] if found else None, groups.plan.pp - 1, group=groups.pp)


def language_logits(model: LanguageModel, tokens_BS: Tensor, *, groups: Groups) -> Tensor:
    """Logits [S, B, T] of texts at every position, on every rank."""
    document_BS, branch_BS, positions_BS = plain_batch(tokens_BS)

    def forward(model: LanguageModel) -> tuple[Tensor, Tensor | None]:
        embeds = model.embed(tokens_BS) if model.pre_process else None
        mask = model.mask(rule_batch(document_BS, branch_BS, positions_BS))
        hidden_SBH = model(embeds, positions_BS, mask)
        if not model.post_process:
            return hidden_SBH, None
        hidden_SBH = gather_positions(hidden_SBH, groups=groups)
        return hidden_SBH, model.logits_full(hidden_SBH)

    batch, length = tokens_BS.shape
    return from_last_stage(model, forward, batch=batch, length=length, groups=groups)
