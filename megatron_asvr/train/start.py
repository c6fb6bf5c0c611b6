"""What a run enters its loop with: fresh from its sources, or as its checkpoint left it."""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron_asvr.platforms import kernels, mcore, select  # noqa: F401  (mcore prepares)

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.identity import engine, identity
from megatron_asvr.checkpoint.load import (
    Resume,
    damaged_frozen,
    find_resume,
    has_scales,
    load_frozen,
    load_trained,
    require_same_run,
)
from megatron_asvr.checkpoint.meta import Meta, ResumeState
from megatron_asvr.checkpoint.save import Save, layout, save_frozen, trained_shapes
from megatron_asvr.config.load import save as save_config
from megatron_asvr.config.load import to_dict
from megatron_asvr.config.schema import Config, TrainConfig
from megatron_asvr.errors import CheckpointError
from megatron_asvr.log import clock
from megatron_asvr.model.asvr import AsvrModel, build_chunks
from megatron_asvr.model.images import ImageReader
from megatron_asvr.parallel.collectives import on_first
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.plan import layout_lines
from megatron_asvr.precision import fuse_gradients
from megatron_asvr.train.assemble import Data, open_features
from megatron_asvr.train.caches import fill_caches
from megatron_asvr.train.optim import make_optimizer, make_schedule, wrap
from megatron_asvr.train.weight_sources import load_sources
from megatron_asvr.train.work import with_past

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything that the loop needs.

    Attributes:
        config: the run.
        groups: process groups of the layout.
        folder: the run's folder.
        attempt: number of this start.
        data: loaders and tokenizers.
        chunks: the bare model of this rank, one or several chunks.
        wrapped: the chunks with their gradient buffers.
        optimizer: of the trained parameters.
        schedule: of the learning rate.
        identity: what a continuation must have in common with this run.
        frozen: files with the weights that are not trained, by part.
        done: where the run stands.
        skipped: why newer checkpoints could not be continued from, by step.
        total_steps: optimizer steps of the whole run.
        zero_s: what ``time.perf_counter`` would have shown when the run had taken no time yet.
    """

    config: Config
    groups: Groups
    folder: RunFolder
    attempt: int
    data: Data
    chunks: list[AsvrModel]
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    identity: Mapping[str, Any]
    frozen: Mapping[str, str]
    done: ResumeState
    skipped: Mapping[int, str]
    total_steps: int
    zero_s: float

    @property
    def elapsed_s(self) -> float:
        """Seconds that the run has taken, all its starts together."""
        return time.perf_counter() - self.zero_s

    @property
    def is_superseded(self) -> bool:
        """Whether a newer start of the run is at work; known to rank 0 alone."""
        return self.groups.rank == 0 and self.folder.last_start() > self.attempt

    def begin_save(self, done: ResumeState, *, background: bool) -> Save:
        """The checkpoint of ``done``, to be published; all ranks take part."""
        meta = Meta(
            resume=done,
            config=to_dict(self.config),
            identity=dict(self.identity),
            layout=layout(self.groups),
            trained=trained_shapes(self.chunks, groups=self.groups),
            frozen=dict(self.frozen),
        )
        return Save(
            self.folder,
            self.chunks,
            self.optimizer,
            meta,
            groups=self.groups,
            attempt=self.attempt,
            background=background,
        )


def start(config: Config, data: Data, *, begun_s: float, groups: Groups) -> Run:
    """The run, ready for its next step. All ranks take part.

    Args:
        config: the run.
        data: of the run.
        begun_s: what ``time.perf_counter`` showed when this start began.
        groups: process groups of the layout.

    Raises:
        CheckpointError: the folder belongs to another run, or a source of weights does not fit.
        ConfigError: a source of weights does not fit.
    """
    facts = _identify(config, data)
    folder = RunFolder(config.run.dir)
    on_first(partial(require_same_run, folder, facts), group=groups.world)
    attempt = on_first(partial(_claim, folder), group=groups.world)
    on_first(partial(_write_bad_samples, folder, data, attempt), group=groups.world)
    resume = _resume(folder, attempt, facts, groups)
    checkpoint = resume.meta

    chunks = build_chunks(config, groups=groups, tokenizer=data.tokenizer)
    if checkpoint is None:
        origins = load_sources(chunks, config, facts=facts, groups=groups)
        frozen = save_frozen(folder, chunks, groups=groups, attempt=attempt)
    else:
        origins = {"all parts": str(folder.step(checkpoint.resume.step))}
        frozen = checkpoint.frozen
        if damaged := damaged_frozen(folder, checkpoint, group=groups.world):
            load_sources(chunks, config, facts=facts, groups=groups)
            _write_frozen_again(folder, damaged, checkpoint, chunks, groups, attempt)
        load_frozen(folder, checkpoint, chunks, groups=groups)
    images = _prepare_encoding(config, data, chunks, groups)
    # Takes a while: after all that can be refused.
    fill_caches(data, groups=groups, images=images, encode=config.data.encode_missing)
    wrapped = wrap(chunks, config.train.optim)
    optimizer = make_optimizer(wrapped, config.train)
    if checkpoint is not None:
        load_trained(folder, checkpoint, chunks, optimizer, groups=groups)
        for chunk in chunks:
            if chunk.watched is not None:
                chunk.watched.turn_off(checkpoint.resume.left_fp8)

    done = checkpoint.resume if checkpoint is not None else ResumeState()
    done = _leave_out(done, folder, groups)
    done = on_first(partial(with_past, done, folder.metrics), group=groups.world)
    total_steps = data.train.total_steps
    schedule = make_schedule(
        optimizer, config.train.optim, total_steps=total_steps, done_steps=done.step
    )
    run = Run(
        config=config,
        groups=groups,
        folder=folder,
        attempt=attempt,
        data=data,
        chunks=chunks,
        wrapped=wrapped,
        optimizer=optimizer,
        schedule=schedule,
        identity=facts,
        frozen=frozen,
        done=done,
        skipped=resume.skipped,
        total_steps=total_steps,
        zero_s=begun_s - done.elapsed_s,
    )
    if groups.rank == 0:
        with folder.being_written(), folder.written(folder.config, attempt) as path:
            save_config(config, path)
    _announce(run, origins)
    if checkpoint is not None and groups.rank == 0:
        _announce_changes(config, checkpoint, groups)
    return run


def _announce_changes(config: Config, checkpoint: Meta, groups: Groups) -> None:
    """Log what is different when a run goes on in another layout or engine, and what is not."""
    now = layout(groups)
    if changes := _changes(checkpoint.layout, now):
        t = config.train
        logger.warning(
            "it goes on with another layout: %s. The global batch (%d samples, micro-batches of %d "
            "on each of %d replicas) and the order of samples are the same; results equal the "
            "undisturbed run up to rounding",
            changes,
            t.global_batch,
            t.micro_batch,
            now["dp"],
        )
    if changes := _changes(engine(checkpoint.config), engine(to_dict(config))):
        logger.warning(
            "it goes on with other products: %s. Results equal the undisturbed run up to rounding",
            changes,
        )
    fp8 = config.precision.fp8
    if fp8.recipe == "delayed" and not (fp8.emulate and has_scales(checkpoint)):
        logger.warning(
            "largest values of earlier steps are kept where 8 bits are emulated before and after: "
            "delayed scaling collects them anew"
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    differ = [name for name in now if now[name] != before.get(name)]
    return ", ".join(f"{name} {now[name]} instead of {before.get(name)}" for name in differ)


def _write_bad_samples(folder: RunFolder, data: Data, attempt: int) -> None:
    """Name every sample that cannot be used in the run's folder."""
    with folder.being_written():
        lines = [
            json.dumps({"split": split, **bad}) + "\n"
            for split, loader in data.splits.items()
            for bad in loader.bad_samples
        ]
        with folder.written(folder.bad_samples, attempt) as path:
            path.write_text("".join(lines), encoding="utf-8")


def _claim(folder: RunFolder) -> int:
    """The number of this start, which from now on is the run's only one; its folder is tidied."""
    with folder.being_written():
        attempt = folder.claim_attempt()
        folder.checkpoints.mkdir(exist_ok=True)
        folder.remove_partial()
    return attempt


def _resume(folder: RunFolder, attempt: int, facts: Mapping[str, Any], groups: Groups) -> Resume:
    """What this start continues from; what cannot be used is named and set aside."""
    resume = find_resume(folder, facts, group=groups.world)
    if groups.rank == 0:
        for step, reason in resume.skipped.items():
            logger.warning("the checkpoint of step %d is not used: %s", step, reason)
            folder.set_aside(step, attempt)
        step = resume.meta.resume.step if resume.meta is not None else None
        now, before = layout(groups), resume.meta.layout if resume.meta is not None else None
        facts = {"step": step, "skipped": resume.skipped, "layout": now, "layout_before": before}
        folder.note_resume(attempt, facts)
    return resume


def _write_frozen_again(
    folder: RunFolder,
    damaged: Sequence[str],
    checkpoint: Meta,
    chunks: Sequence[AsvrModel],
    groups: Groups,
    attempt: int,
) -> None:
    """Make damaged files of weights that are not trained again, from where they came from.

    Raises:
        CheckpointError: the sources give other weights now.
    """
    if save_frozen(folder, chunks, groups=groups, attempt=attempt) != checkpoint.frozen:
        raise CheckpointError(
            f"{folder.frozen / damaged[0]} is damaged, and the sources of weights (init) no longer "
            "give what it held; restore the file from a copy"
        )
    if groups.rank == 0:
        logger.warning("written again from the sources of weights: %s", ", ".join(damaged))


def _leave_out(done: ResumeState, folder: RunFolder, groups: Groups) -> ResumeState:
    """Where the run stands, with the batches that were left out after its checkpoint as well."""
    events = on_first(folder.events, group=groups.world)
    batches = {*done.skipped, *(batch for event in events for batch in event["batches"])}
    return replace(done, skipped=sorted(batches))


def _identify(config: Config, data: Data) -> dict[str, Any]:
    fingerprint = data.tokenizer.fingerprint if data.tokenizer is not None else None
    return identity(config, tokenizer_fingerprint=fingerprint, image_keys=data.train.image_keys())


def _prepare_encoding(
    config: Config, data: Data, chunks: Sequence[AsvrModel], groups: Groups
) -> ImageReader | None:
    """What encodes on this rank, after settling what is done once and what not at all."""
    images = chunks[0].images
    left_out = sum(chunk.leave_out_unused() for chunk in chunks)
    lines = [f"vision_encoder: {left_out:,} parameters behind the selected layer are left out"]
    if data.tokenizer is not None:
        lines.append(images.join(data.tokenizer))
    if groups.rank == 0:
        logger.info("%s", "\n".join(lines))
    if config.data.features == "cache":
        open_features(config, data, images, groups=groups)
    return images if groups.is_first_stage else None


def idle_settings(train: TrainConfig) -> list[str]:
    """Settings of ``train`` that are switched on and do nothing on this platform."""
    if select()[0].name == "cuda":
        return []
    return [name for name in ("compile", "cuda_graphs") if getattr(train, name)]


def _announce(run: Run, origins: Mapping[str, str]) -> None:
    """Log, on rank 0, what was decided before the first step; all ranks take part."""
    shapes = trained_shapes(run.chunks, groups=run.groups)
    if run.groups.rank:
        return
    platform, reason = select()
    logger.info("platform %s (%s)", platform.name, reason)
    lines = layout_lines(run.config, run.groups.plan.world, run.data.codebook_sizes)
    logger.info("%s", "\n".join(lines))
    backend = run.chunks[0].language_model
    logger.info("layers %s (%s)", backend.backend, backend.backend_reason)
    fused, reason = fuse_gradients(platform)
    logger.info("gradients added in the products: %s (%s)", "yes" if fused else "no", reason)
    are_used, reason = kernels.decided()
    logger.info("C++ kernels: %s (%s)", "yes" if are_used else "no", reason)
    for name in idle_settings(run.config.train):
        logger.warning("train.%s=true has no effect: the platform is %s", name, platform.name)
    for part, origin in origins.items():
        logger.info("weights of %s from %s", part, origin)
    trained = sum(math.prod(shape) for shape in shapes.values())
    logger.info("%d parameters trained: %s", trained, ", ".join(run.config.train.trainable))
    dp = run.groups.plan.dp
    if dp > 1 and run.done.step < run.total_steps:
        logger.info("%s", run.data.train.imbalance(run.done.step).describe(dp))
    logger.info("%d of %d steps done", run.done.step, run.total_steps)
    if run.done.lost_s:
        logger.info("%s of earlier starts came after their checkpoints", clock(run.done.lost_s))
