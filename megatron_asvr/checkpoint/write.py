"""One rank's share of a checkpoint: planned by megatron-core, written here.

megatron-core decides which rank writes which part of which tensor. Writing it too, it would fork
helpers that outlive a killed rank (up to 0.16), and wait for ever in a collective when the disk of
one rank is full. So what can fail on one rank alone is done here, without any collective, and the
ranks tell one another afterwards how it went (``save.py``).
"""

import contextlib
import hashlib
import io
import os
import queue
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_asvr.platforms import mcore

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from megatron_asvr.checkpoint.index import COMMON
from megatron_asvr.checkpoint.meta import FileFacts

# Where the helpers would leave their results; made by itself it starts a process.
filesystem_async._results_queue = queue.SimpleQueue()

_BACKEND = ("torch_dist", 1)
_BUFFER_BYTES = 1 << 20
_HAS_PLANNERS = tuple(int(x) for x in mcore.version.split(".")[:2]) >= (0, 17)
# Newer versions of torch know several formats; this is the one of all.
_FORMAT = (
    [filesystem.SerializationFormat.TORCH_SAVE]
    if hasattr(filesystem, "SerializationFormat")
    else []
)


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank has to write, held so that the run may go on.

    Attributes:
        path: the folder.
        files: name and contents (places in the index, with their data) of each file.
        common: contents of ``common.pt`` on rank 0.
        writer: megatron-core's writer, which knows how the index is written.
        index: places of all tensors on rank 0, still without files and offsets.
    """

    path: Path
    files: list[tuple[str, list[tuple[Any, Any]]]]
    common: bytes | None
    writer: Any
    index: Metadata | None


@dataclass(slots=True)
class Written:
    """What became of a share.

    Attributes:
        results: where each part of a tensor lies now.
        files: size and checksum of each file, by name.
    """

    results: list[WriteResult] = field(default_factory=list)
    files: dict[str, FileFacts] = field(default_factory=dict)


def plan(state: dict[str, Any], path: Path, *, copy: bool) -> Share:
    """This rank's share of a sharded state; all ranks take part.

    Args:
        state: of ``sharded_state``.
        path: the folder to write, which exists.
        copy: hold copies of the tensors, so that they may change before they are written.
    """
    sharded, common = save_preprocess(state)
    way = ["mcore"] * _HAS_PLANNERS  # the other one is of another package
    writer, index = _Planner(*_BACKEND, thread_count=1).async_save(sharded, path, *way)
    files = [
        (name, [*objects, *((item, x.detach().to("cpu", copy=copy)) for item, x in tensors)])
        for _, name, (objects, tensors) in writer.write_buckets
    ]
    writer.write_buckets = None
    buffer = io.BytesIO()
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        torch.save(common, buffer)
    return Share(path, files, buffer.getvalue() if is_first else None, writer, index)


class _Planner(TorchDistSaveShardedStrategy):
    """megatron-core's way to save, cut off after the plan."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_: Any) -> Any:
        _, index, _ = planned
        return writer, index


def write(share: Share) -> Written:
    """Write this rank's files onto the disk, hashing on the way.

    Raises:
        OSError: the system refused.
    """
    done = Written()
    for name, contents in share.files:
        with HashingFile(share.path / name) as file:
            for item, data in contents:
                how = (share.writer.transforms, file, data, item, name, *_FORMAT)
                done.results.append(filesystem._write_item(*how))
        done.files[name] = file.facts
    if share.common is not None:
        with HashingFile(share.path / COMMON) as file:
            file.write(share.common)
        done.files[COMMON] = file.facts
    return done


def write_index(share: Share, results: Iterable[list[WriteResult]]) -> None:
    """Write where everything lies, on rank 0.

    Args:
        share: of rank 0.
        results: of every rank.

    Raises:
        OSError: the system refused.
    """
    share.writer.finish(share.index, list(results))
    save_config(CheckpointingConfig(*_BACKEND), str(share.path))


class HashingFile:
    """``with HashingFile(path) as file:`` writes a new file onto the disk; then it has ``facts``.

    The checksum is of what was meant to be written, so a disk that stores something else is found.
    An error of the system leaves as itself, whatever the code in between makes of it.
    """

    facts: FileFacts

    def __init__(self, path: Path) -> None:
        self._error: OSError | None = None
        self._hash = hashlib.sha256()
        self._size = 0
        self._file = path.open("wb", buffering=_BUFFER_BYTES)

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""
        try:
            count = self._file.write(data)
        except OSError as err:
            self._error = err
            raise
        self._hash.update(data)
        self._size += count
        return count

    def tell(self) -> int:
        """Bytes so far."""
        return self._size

    def flush(self) -> None:
        """Do nothing: everything goes out at the end."""

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            with contextlib.suppress(OSError):  # that of the flush again
                self._file.close()
        if self._error is not None:
            raise self._error
        self.facts = {"bytes": self._size, "sha256": self._hash.hexdigest()}
