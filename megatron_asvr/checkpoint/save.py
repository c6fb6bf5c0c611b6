"""Write a checkpoint: complete under its final name, or not there at all."""

import logging
import queue
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_asvr.checkpoint.folder import RunFolder, fsync
from megatron_asvr.checkpoint.frozen import write_frozen
from megatron_asvr.checkpoint.meta import Meta, write_meta
from megatron_asvr.checkpoint.state import sharded_state
from megatron_asvr.config.schema import PARTS
from megatron_asvr.errors import CheckpointError
from megatron_asvr.model.sharding import full_shapes, full_state
from megatron_asvr.parallel.collectives import barrier, broadcast_object
from megatron_asvr.parallel.groups import Groups

logger = logging.getLogger(__name__)


def save_frozen(
    folder: RunFolder, chunks: Sequence[nn.Module], *, groups: Groups
) -> dict[str, str]:
    """File in ``frozen/`` of every part that has weights which are not trained.

    All ranks take part, since the full tensors are gathered; rank 0 writes.

    Args:
        folder: the run's folder.
        chunks: the bare model of this rank (no wrappers), its parts as children.
        groups: process groups of the layout.

    Raises:
        CheckpointError: a tensor cannot be written.
    """
    files: dict[str, str] = {}
    for part in PARTS:

        def frozen(name: str, parameter: nn.Parameter, part: str = part) -> bool:
            return name.startswith(f"{part}.") and not parameter.requires_grad

        names = full_shapes(chunks, groups=groups, only=frozen)
        tensors = full_state(chunks, groups=groups, only=frozen)
        if names and groups.rank == 0:
            files[part] = write_frozen(folder.frozen, part, names, tensors)
        else:
            for _ in tensors:  # the gathers behind the iterator need every rank
                pass
    return broadcast_object(files, group=groups.world)


def layout(groups: Groups) -> dict[str, object]:
    """Parallel degrees and versions, as recorded in a checkpoint."""
    plan = groups.plan
    degrees = {name: getattr(plan, name) for name in ("tp", "pp", "vpp", "cp", "dp", "sp", "ep")}
    return {**degrees, "megatron-core": mcore.version}


def trained_shapes(chunks: Sequence[nn.Module], *, groups: Groups) -> dict[str, list[int]]:
    """Full shape, without padding, of every trained parameter of all stages; all take part."""
    shapes = full_shapes(chunks, groups=groups, only=lambda _, param: param.requires_grad)
    return {name: list(shape) for name, shape in shapes.items()}


def save_checkpoint(
    folder: RunFolder,
    chunks: Sequence[nn.Module],
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
        chunks: the bare model of this rank.
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
    unfinished = folder.partial(step, attempt)
    if groups.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    barrier(group=groups.world)
    _write(sharded_state(chunks, optimizer, is_loading=False), unfinished)
    if groups.rank == 0:
        _finish(folder, unfinished, meta, attempt)
        folder.prune(keep)
        seconds = time.perf_counter() - started
        logger.info("saved %s in %.1f s", folder.step(step), seconds)


def _write(state: dict[str, Any], path: Path) -> None:
    """Write a sharded state from this process, on all ranks.

    Up to megatron-core 0.16 a save forks writers (strategies/filesystem_async.py:266), which would
    outlive a killed rank for ever, with its memory and its open pipes. So there the request of an
    asynchronous save is taken and carried out here.
    """
    if tuple(int(x) for x in mcore.version.split(".")[:2]) >= (0, 17):
        dist_checkpointing.save(state, str(path))
        return
    request = dist_checkpointing.save(state, str(path), async_sharded_save=True)
    if request.async_fn is not None:  # None on a rank without anything to write
        request = request._replace(async_fn=partial(_write_files, request.async_fn.args[0]))
    request.execute_sync()


def _write_files(transforms: list[Any], rank: int, buckets: list[Any], results: Any) -> None:
    """What ``FileSystemWriterAsync.write_preloaded_data_multiproc`` does, without processes."""
    written: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    for number, bucket in enumerate(buckets):
        started: queue.Queue[int] = queue.Queue()
        started.put(number)
        FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, written, started, use_fsync=True
        )
    found = dict(written.get() for _ in buckets)
    errors = [x for x in found.values() if isinstance(x, Exception)]
    results.put(errors[0] if errors else found)


def _finish(folder: RunFolder, unfinished: Path, meta: Meta, attempt: int) -> None:
    newest = folder.last_attempt()
    if newest > attempt:
        # A scheduler may start a job again while ranks of the old attempt are still alive.
        raise CheckpointError(
            f"attempt {newest} of {folder.root} has started since, so attempt {attempt} must not "
            f"write {folder.step(meta.resume.step).name} any more; it stops here"
        )
    write_meta(unfinished, meta)
    fsync(unfinished)
    final = folder.step(meta.resume.step)
    if final.exists():  # incomplete by hand: a complete one would have been continued from
        shutil.rmtree(final)
    unfinished.rename(final)
    fsync(folder.checkpoints)
