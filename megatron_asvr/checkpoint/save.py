"""Write a checkpoint: complete under its final name, or not there at all."""

import logging
import shutil
import time
from pathlib import Path

from megatron_asvr.platforms import mcore

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_asvr.checkpoint.folder import RunFolder, fsync
from megatron_asvr.checkpoint.frozen import keep_names, write_frozen
from megatron_asvr.checkpoint.meta import Meta, write_meta
from megatron_asvr.checkpoint.state import sharded_state
from megatron_asvr.config.schema import PARTS
from megatron_asvr.errors import CheckpointError
from megatron_asvr.model.sharding import canonical_names, full_shape, full_state
from megatron_asvr.parallel.groups import Groups

logger = logging.getLogger(__name__)


def save_frozen(folder: RunFolder, model: nn.Module, *, groups: Groups) -> dict[str, str]:
    """File in ``frozen/`` of every part that has weights which are not trained.

    All ranks take part, since the full tensors are gathered; rank 0 writes.

    Args:
        folder: the run's folder.
        model: the bare model (no wrappers), its parts as children.
        groups: process groups of the layout.

    Raises:
        CheckpointError: a tensor cannot be written.
    """
    names = canonical_names(model)
    frozen = {names[local] for local, p in model.named_parameters() if not p.requires_grad}
    files: dict[str, str] = {}
    for part in PARTS:
        mine = {name for name in frozen if name.startswith(f"{part}.")}
        if not mine:
            continue
        tensors = full_state(getattr(model, part), groups=groups, prefix=f"{part}.")
        if groups.rank == 0:
            files[part] = write_frozen(folder.frozen, part, mine, keep_names(tensors, mine))
        else:
            for _ in tensors:  # the gathers behind the iterator need every rank
                pass
    shared = [files]
    dist.broadcast_object_list(shared, src=0, group=groups.world)
    return shared[0]


def layout(groups: Groups) -> dict[str, object]:
    """Parallel degrees and versions, as recorded in a checkpoint."""
    plan = groups.plan
    degrees = {name: getattr(plan, name) for name in ("tp", "pp", "vpp", "cp", "dp", "sp")}
    return {**degrees, "megatron-core": mcore.version}


def trained_shapes(model: nn.Module, *, groups: Groups) -> dict[str, list[int]]:
    """Full shape, without padding, of every trained parameter by its canonical name."""
    names = canonical_names(model)
    return {
        names[local]: list(full_shape(param, groups=groups))
        for local, param in model.named_parameters()
        if param.requires_grad
    }


def save_checkpoint(
    folder: RunFolder,
    model: nn.Module,
    optimizer: MegatronOptimizer,
    meta: Meta,
    *,
    groups: Groups,
    attempt: int,
    keep: int,
) -> None:
    """Write the checkpoint of ``meta.resume.step``, then delete the oldest ones.

    All ranks take part. Rank 0 gives the folder its final name after every rank has written its
    share; the others go on meanwhile.

    Args:
        folder: the run's folder.
        model: the bare model.
        optimizer: megatron-core's optimizer of it.
        meta: everything that is not a tensor; ``files`` is filled here.
        groups: process groups of the layout.
        attempt: number of this start, see ``RunFolder.next_attempt``.
        keep: complete checkpoints to keep.

    Raises:
        CheckpointError: a newer start of the same run is at work.
    """
    started = time.perf_counter()
    step = meta.resume.step
    partial = folder.partial(step, attempt)
    if groups.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=groups.world)
    dist_checkpointing.save(sharded_state(model, optimizer, is_loading=False), str(partial))
    if groups.rank == 0:
        _finish(folder, partial, meta, attempt)
        folder.prune(keep)
        seconds = time.perf_counter() - started
        logger.info("saved %s in %.1f s", folder.step(step), seconds)


def _finish(folder: RunFolder, partial: Path, meta: Meta, attempt: int) -> None:
    newest = folder.last_attempt()
    if newest > attempt:
        # A scheduler may start a job again while ranks of the old attempt are still alive.
        raise CheckpointError(
            f"attempt {newest} of {folder.root} has started since, so attempt {attempt} must not "
            f"write {folder.step(meta.resume.step).name} any more; it stops here"
        )
    write_meta(partial, meta)
    fsync(partial)
    final = folder.step(meta.resume.step)
    if final.exists():  # incomplete by hand: a complete one would have been continued from
        shutil.rmtree(final)
    partial.rename(final)
    fsync(folder.checkpoints)
