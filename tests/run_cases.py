"""A small model, its tokenizer and synthetic micro-batches, for the tests of training."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_asvr.platforms import mcore  # noqa: F401

import torch
from torch import Tensor

from megatron_asvr.batch import IGNORE, MicroBatch, image_share
from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.load import load_frozen, load_trained
from megatron_asvr.checkpoint.meta import Meta, ResumeState
from megatron_asvr.checkpoint.save import Save, layout, prune, save_frozen, trained_shapes
from megatron_asvr.config.load import from_dict, to_dict
from megatron_asvr.config.schema import Config, VisionConfig
from megatron_asvr.model.asvr import AsvrModel, build_chunks
from megatron_asvr.model.sharding import full_state, named
from megatron_asvr.model.tokenizer import TokenizerConfig, VisualTokenizer
from megatron_asvr.parallel.context import partition
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.train.optim import make_optimizer, make_schedule, wrap
from megatron_asvr.train.passes import LossFunction, backward, balancing
from megatron_asvr.train.step import StepResult, agree, loss_function, reduce_gradients, train_step

CODEBOOK_SIZES = (7, 6, 5)
IDENTITY = {"run.seed": 3}  # of the runs in ``save``
TREE: dict[str, Any] = {
    "run": {"seed": 3, "wandb": "disabled"},
    "model": {
        "language": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 48,
            "vocab_size": 90,
            "init_std": 0.1,
        },
        "vision": {
            "hidden_size": 16,
            "num_layers": 3,
            "num_heads": 2,
            "ffn_hidden_size": 24,
            "image_size": 16,
            "patch_size": 8,
            "init_std": 0.2,
        },
        "visual_head": {"width": 16, "num_layers": 1, "num_heads": 2, "init_std": 0.1},
    },
    "train": {
        "steps": 6,
        "global_batch": 4,
        "micro_batch": 2,
        "precision": "fp32",
        "optim": {"lr": 1e-2, "warmup_fraction": 0.2, "weight_decay": 0.1},
    },
}


def config(**changes: Any) -> Config:
    """The small run; ``section__name=value`` changes a setting (``train__optim__lr=1``)."""
    tree = dict(TREE)
    for key, value in changes.items():
        tree = _changed(tree, key.split("__"), value)
    return from_dict(tree)


def _changed(tree: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    if len(path) == 1:
        return {**tree, path[0]: value}
    return {**tree, path[0]: _changed(tree.get(path[0], {}), path[1:], value)}


def tokenizer(
    vision: VisionConfig,
    *,
    kind: Literal["semantic", "appearance"] = "semantic",
    feature_layer: int | None = -2,
    seed: int = 1,
) -> VisualTokenizer:
    """A tokenizer of the right shape with random weights."""
    made = VisualTokenizer(
        TokenizerConfig(
            kind=kind, vision=vision, feature_layer=feature_layer, codebook_sizes=CODEBOOK_SIZES
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in made.parameters():
            param.copy_(0.2 * torch.randn(param.shape, generator=generator))
    made.set_codebooks([torch.randn(k, made.width, generator=generator) for k in CODEBOOK_SIZES])
    return made


LENGTH = 16  # of every row: what all layouts of the tests divide


def micro_batch(run: Config, seed: int, *, images: tuple[int, ...] = (1, 0)) -> MicroBatch:
    """Samples of a few words; sample b starts with ``images[b]`` images; -1: a row of padding.

    Args:
        run: the small run.
        seed: of everything in it.
        images: number of images of every sample.
    """
    generator = torch.Generator().manual_seed(seed)
    patches, vision = run.model.vision.num_patches, run.model.vision
    rows = len(images)
    tokens_BS = torch.randint(3, run.model.language.vocab_size, (rows, LENGTH), generator=generator)
    targets_BS = tokens_BS.roll(-1, 1)
    document_BS = torch.full((rows, LENGTH), -1, dtype=torch.int32)
    positions: list[int] = []
    for b, number in enumerate(images):
        end = 0 if number < 0 else patches * number + 6
        targets_BS[b, : patches * max(0, number)] = IGNORE
        targets_BS[b, max(0, end - 1) :] = IGNORE
        document_BS[b, :end] = b
        positions += [b * LENGTH + s for s in range(patches * number)]
    positions_P = torch.tensor(positions, dtype=torch.int64)
    count = len(positions) // patches
    pixels = torch.randn(count, 3, vision.image_size, vision.image_size, generator=generator)
    codes = [torch.randint(k, (len(positions),), generator=generator) for k in CODEBOOK_SIZES]
    return MicroBatch(
        tokens_BS=tokens_BS,
        position_ids_BS=torch.arange(LENGTH).expand(rows, LENGTH).contiguous(),
        text_targets_BS=targets_BS,
        document_BS=document_BS,
        branch_BS=torch.zeros(rows, LENGTH, dtype=torch.int32),
        index_BS=torch.arange(LENGTH).repeat(rows, 1),
        image_positions_P=positions_P,
        image_patches_P=torch.arange(len(positions)),
        pixel_values_ICHW=pixels if count else None,
        image_share=(0, count),
        num_images=count,
        visual_positions_M=positions_P.clone(),
        visual_patches_M=torch.arange(len(positions)),
        codes_PD=torch.stack(codes, 1),
        sample_ids=[f"sample {seed}.{b}" for b in range(rows) if images[b] >= 0],
    )


def view_of(batch: MicroBatch, groups: Groups) -> MicroBatch:
    """What this rank gets of a whole micro-batch, each of whose rows is one document."""
    first, text, last = groups.is_first_stage, groups.has_text_loss, groups.is_last_stage
    cp = groups.plan.cp
    total = batch.document_BS.numel()
    starts = range(0, total + 1, LENGTH)
    parts = [torch.from_numpy(partition(starts, total, cp, rank)).long() for rank in range(cp)]
    columns_BS = torch.cat([part.view(-1, LENGTH // cp) for part in parts], 1)
    own = parts[groups.cp_rank]
    place = torch.full((total,), -1).scatter(0, own, torch.arange(len(own)))
    patches, targets = (place[x] for x in (batch.image_positions_P, batch.visual_positions_M))
    share = image_share(batch.num_images, groups.tp_cp.rank(), groups.tp_cp.size())
    none = torch.empty(0, dtype=torch.int64)
    whole = ("position_ids_BS", "document_BS", "branch_BS", "index_BS")
    pixels = batch.pixel_values_ICHW
    return dataclasses.replace(
        batch,
        **{name: getattr(batch, name).flatten()[columns_BS] for name in whole},
        tokens_BS=batch.tokens_BS.flatten()[own].view(-1, LENGTH // cp) if first else None,
        text_targets_BS=(
            batch.text_targets_BS.flatten()[own].view(-1, LENGTH // cp) if text else None
        ),
        image_positions_P=patches[patches >= 0] if first else none,
        image_patches_P=batch.image_patches_P[patches >= 0] if first else none,
        pixel_values_ICHW=pixels[slice(*share)] if first and pixels is not None else None,
        image_share=share,
        visual_positions_M=targets[targets >= 0] if last else none,
        visual_patches_M=batch.visual_patches_M[targets >= 0] if last else none,
        codes_PD=batch.codes_PD if last else None,
        context=(groups.cp_rank, cp),
    )


SHAPES = ((1, 0), (2, 1), (0, 0), (-1, -1))


def step_batches(run: Config, step: int, groups: Groups) -> list[MicroBatch]:
    """This rank's micro-batches of a step: the same global batch in every layout."""
    number = run.train.global_batch // run.train.micro_batch
    every = [micro_batch(run, 100 * step + i, images=SHAPES[i % 4]) for i in range(number)]
    share = number // groups.plan.dp
    mine = every[groups.dp_rank * share : (groups.dp_rank + 1) * share]
    return [view_of(batch, groups) for batch in mine]


@dataclasses.dataclass
class Bench:
    """Everything that training needs, without data or files."""

    run: Config
    groups: Groups
    done_steps: int = 0
    resume: tuple[RunFolder, Meta] | None = None

    def __post_init__(self) -> None:
        made = tokenizer(self.run.model.vision) if self.run.loss.visual_weight else None
        self.chunks: list[AsvrModel] = build_chunks(self.run, groups=self.groups, tokenizer=made)
        if self.resume is not None:
            load_frozen(*self.resume, self.chunks, groups=self.groups)
            self.done_steps = self.resume[1].resume.step
        self.wrapped = wrap(self.chunks, self.run.train.optim)
        self.optimizer = make_optimizer(self.wrapped, self.run.train)
        if self.resume is not None:
            load_trained(*self.resume, self.chunks, self.optimizer, groups=self.groups)
        self.schedule = make_schedule(
            self.optimizer,
            self.run.train.optim,
            total_steps=self.run.train.steps,
            done_steps=self.done_steps,
        )

    def step(self, step: int, batches: Sequence[MicroBatch] | None = None) -> StepResult:
        """Train on ``batches``, by default those of ``step``."""
        batches = batches or step_batches(self.run, step, self.groups)
        parts = (self.wrapped, self.optimizer, batches, self.loss(batches))
        result = train_step(*parts, step=step, groups=self.groups)
        self.schedule.step(1)
        return result

    def loss(self, batches: Sequence[MicroBatch]) -> LossFunction:
        """From sums to the loss of a step with these batches."""
        agreement = agree(batches, stop=False, groups=self.groups)
        return loss_function(self.run.loss, agreement, num_micro_batches=len(batches))

    def gradients(self, batches: Sequence[MicroBatch] | None = None) -> dict[str, Tensor]:
        """Full gradients of the trained parameters, by default on the batches of step 0."""
        batches, groups = batches or step_batches(self.run, 0, self.groups), self.groups
        loss = self.loss(batches)
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        with balancing(self.wrapped, batches, loss, groups=groups):
            backward(self.wrapped, batches, loss)
        reduce_gradients(self.wrapped, groups=groups, whole=True)
        found = full_state(
            self.chunks, groups=groups, only=lambda _, p: p.requires_grad, of=lambda p: p.main_grad
        )
        return {name: gradient.clone() for name, gradient in found}  # a buffer is used again

    @property
    def model(self) -> AsvrModel:
        """The bare model where it is not cut into stages."""
        (model,) = self.chunks
        return model

    def weights(self) -> dict[str, Tensor]:
        """A copy of this rank's shards."""
        return {name: p.detach().clone() for name, p in named(self.chunks)}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], what: str = "") -> None:
    """Within 1e-5 of the norm of each, or where that is tiny of 1e-3 of the whole gradient's."""
    assert list(got) == list(want), what
    floor = 1e-3 * float(torch.stack([g.norm() for g in want.values()]).norm())
    errors = {
        name: float((got[name] - grad).norm()) / max(float(grad.norm()), floor, 1e-30)
        for name, grad in want.items()
    }
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}, what


def save(
    bench: Bench, run_folder: RunFolder, step: int, *, attempt: int = 0, keep: int = 9
) -> Meta:
    """Write a checkpoint of ``step``; what its meta.json says."""
    meta = Meta(
        resume=ResumeState(step=step),
        config=to_dict(bench.run),
        identity=IDENTITY,
        layout=layout(bench.groups),
        trained=trained_shapes(bench.chunks, groups=bench.groups),
        frozen=save_frozen(run_folder, bench.chunks, groups=bench.groups, attempt=attempt),
    )
    parts = (run_folder, bench.chunks, bench.optimizer, meta)
    failure = Save(*parts, groups=bench.groups, attempt=attempt).publish()
    assert failure is None, failure
    if bench.groups.rank == 0:
        prune(run_folder, keep)
    return meta


def folder(path: str | Path) -> RunFolder:
    """A run folder whose first attempt has started."""
    made = RunFolder(Path(path))
    made.claim_attempt()
    return made
