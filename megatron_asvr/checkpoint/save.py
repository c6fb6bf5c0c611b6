"""Write a checkpoint: complete under its final name, or not there at all.

A save that fails is no error of the run: every rank learns why, nothing is left of it, and the
checkpoints before it are untouched.
"""

import dataclasses
import functools
import logging
import shutil
import threading
import time
from collections.abc import Sequence

from megatron_asvr.platforms import mcore

from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_asvr.checkpoint.folder import RunFolder, fsync
from megatron_asvr.checkpoint.frozen import write_frozen
from megatron_asvr.checkpoint.meta import Meta, write_meta
from megatron_asvr.checkpoint.state import parts
from megatron_asvr.checkpoint.write import Share, Written, plan, write, write_index
from megatron_asvr.config.schema import PARTS
from megatron_asvr.model.sharding import full_shapes, full_state
from megatron_asvr.parallel.collectives import broadcast_object, gather_objects, on_first
from megatron_asvr.parallel.groups import Groups

logger = logging.getLogger(__name__)


def save_frozen(
    folder: RunFolder, chunks: Sequence[nn.Module], *, groups: Groups, attempt: int
) -> dict[str, str]:
    """File in ``frozen/`` of every part that has weights which are not trained.

    All ranks take part, since the full tensors are gathered; rank 0 writes.

    Args:
        folder: the run's folder.
        chunks: the bare model of this rank (no wrappers), its parts as children.
        groups: process groups of the layout.
        attempt: number of this start.

    Raises:
        CheckpointError: a tensor or a file cannot be written, or a newer start is at work.
    """
    files: dict[str, str] = {}
    for part in PARTS:

        def frozen(name: str, parameter: nn.Parameter, part: str = part) -> bool:
            return name.startswith(f"{part}.") and not parameter.requires_grad

        names = full_shapes(chunks, groups=groups, only=frozen)
        tensors = full_state(chunks, groups=groups, only=frozen)
        if names and groups.rank == 0:
            with folder.being_written():
                files[part] = write_frozen(folder, part, names, tensors, attempt=attempt)
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


class Save:
    """One checkpoint on its way to the disk. All ranks make it, and all ``publish`` it.

    Args:
        folder: the run's folder.
        chunks: the bare model of this rank.
        optimizer: megatron-core's optimizer of it.
        meta: everything that is not a tensor; ``files`` is filled here.
        groups: process groups of the layout.
        attempt: number of this start, see ``RunFolder.next_attempt``.
        background: write copies in a thread, while the run goes on.

    Raises:
        CheckpointError: on every rank: a newer start of the same run is at work.
    """

    def __init__(
        self,
        folder: RunFolder,
        chunks: Sequence[nn.Module],
        optimizer: MegatronOptimizer,
        meta: Meta,
        *,
        groups: Groups,
        attempt: int,
        background: bool = False,
    ) -> None:
        self._started = time.perf_counter()
        self._folder, self._meta, self._groups, self._attempt = folder, meta, groups, attempt
        self._path = folder.partial(meta.resume.step, attempt)
        self._written: Written | str = Written()
        self._thread: threading.Thread | None = None
        self._share: Share | None = None
        self._failure: str | None = on_first(self._make_folder, group=groups.world)
        if self._failure is not None:
            return
        held = parts(chunks, optimizer)
        self._share = plan(held, self._path, rank=groups.rank, copy=background)
        if background:
            self._thread = threading.Thread(target=self._write, daemon=True, name="checkpoint")
            self._thread.start()
        else:
            self._write()

    @property
    def step(self) -> int:
        """Optimizer steps done in it."""
        return self._meta.resume.step

    @property
    def is_written(self) -> bool:
        """Whether this rank has nothing to write any more, so that ``publish`` need not wait."""
        return self._thread is None or not self._thread.is_alive()

    def publish(self) -> str | None:
        """Why there is no checkpoint, on every rank; None when it is there under its final name.

        All ranks take part. Rank 0 gives the folder its name when every rank has written its share.

        Raises:
            CheckpointError: on every rank: a newer start of the same run is at work.
        """
        if self._thread is not None:
            self._thread.join()
        if self._failure is None:
            shares = gather_objects(self._written, group=self._groups.world)
            finish = functools.partial(self._finish, shares)
            self._failure = on_first(finish, group=self._groups.world)
        return self._failure

    def _make_folder(self) -> str | None:
        self._folder.require_newest(self._attempt)
        shutil.rmtree(self._path, ignore_errors=True)
        try:
            self._path.mkdir(parents=True)
        except OSError as err:
            return f"rank 0: {err}"
        return None

    def _write(self) -> None:
        """Write this rank's share; what goes wrong is told to all ranks later."""
        assert self._share is not None
        try:
            self._written = write(self._share)
        except Exception as err:
            self._written = f"rank {self._groups.rank}: {type(err).__name__}: {err}"
        self._share = None

    def _finish(self, shares: list[Written | str]) -> str | None:
        """On rank 0: give it its name, or remove what was written and say why."""
        failure: str | None = "; ".join(share for share in shares if isinstance(share, str))
        try:
            if not failure:
                self._name([share for share in shares if isinstance(share, Written)])
                return None
        except OSError as err:
            self._folder.require_newest(self._attempt)  # whose start moves unfinished folders away
            failure = f"rank 0: {err}"
        finally:
            shutil.rmtree(self._path, ignore_errors=True)
        return failure

    def _name(self, shares: list[Written]) -> None:
        entries = [entry for share in shares for entry in share.entries]
        files = write_index(self._path, entries, promised=self._meta.trained)
        files |= {name: facts for share in shares for name, facts in share.files.items()}
        write_meta(self._path, dataclasses.replace(self._meta, files=files))
        fsync(self._path)
        final = self._folder.step(self.step)
        if final.exists():  # incomplete by hand: a complete one would have been continued from
            self._folder.delete(final)
        self._folder.give_name(self._path, final, self._attempt)
        logger.info("saved %s in %.1f s", final, time.perf_counter() - self._started)


def prune(folder: RunFolder, keep: int, keep_every: int = 0) -> None:
    """Delete the checkpoints that the policy of ``RunFolder.doomed`` lets go."""
    for step in folder.doomed(keep, keep_every):
        try:
            folder.delete(folder.step(step))
        except OSError as err:
            logger.warning("%s cannot be deleted: %s", folder.step(step), err)
