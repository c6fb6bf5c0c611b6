"""One rank's share of a checkpoint, written as torch and megatron-core read it (``torch_dist``).

Nothing here is a collective: what fails on one rank alone, such as a full disk, must not leave the
others waiting. The ranks tell one another afterwards how it went (``save.py``).
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process)

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_asvr.checkpoint.index import COMMON, INDEX, Shape
from megatron_asvr.checkpoint.meta import FileFacts
from megatron_asvr.checkpoint.state import Part
from megatron_asvr.errors import CheckpointError

_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank has to write, held so that the run may go on.

    Attributes:
        path: of the file.
        parts: that this rank writes, with their numbers on the CPU.
    """

    path: Path
    parts: list[tuple[Part, Tensor]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A box of a tensor on the disk.

    Attributes:
        key: name of the tensor.
        dtype: of the tensor.
        shape: of the whole tensor.
        offset: of the box's first element.
        size: of the box.
        place: its file, first byte there, and length in bytes.
    """

    key: str
    dtype: torch.dtype
    shape: Shape
    offset: Shape
    size: Shape
    place: tuple[str, int, int]


@dataclass(slots=True)
class Written:
    """What became of a share.

    Attributes:
        entries: where each part lies now.
        files: size and checksum of each file, by name.
    """

    entries: list[Entry] = field(default_factory=list)
    files: dict[str, FileFacts] = field(default_factory=dict)


def plan(held: Sequence[Part], folder: Path, *, rank: int, copy: bool) -> Share:
    """A rank's share.

    Args:
        held: of ``parts``.
        folder: to write to, which exists.
        rank: of all.
        copy: hold copies of the tensors, so that they may change before they are written.
    """
    mine = [(part, part.memory.to("cpu", copy=copy)) for part in held if part.is_main]
    return Share(folder / f"__{rank}_0.distcp", mine)


def write(share: Share) -> Written:
    """Write a share onto the disk, hashing on the way.

    Raises:
        OSError: the system refused.
    """
    done, name = Written(), share.path.name
    with HashingFile(share.path) as file:
        for part, numbers in share.parts:
            start = file.tell()
            # A view would be saved with all of the memory that it looks at.
            is_view = numbers.untyped_storage().nbytes() != numbers.nbytes
            torch.save(numbers.clone() if is_view else numbers, file)
            place = (name, start, file.tell() - start)
            box = (part.shape, part.offset, part.size)
            done.entries.append(Entry(part.key, numbers.dtype, *box, place))
    done.files[name] = file.facts
    return done


def write_index(
    folder: Path, entries: Iterable[Entry], *, promised: Iterable[str]
) -> dict[str, FileFacts]:
    """Write where everything lies; size and checksum of the files.

    Args:
        folder: of the checkpoint.
        entries: of every rank.
        promised: names of tensors that must be there.

    Raises:
        CheckpointError: a tensor is not there, or not exactly once.
        OSError: the system refused.
    """
    tensors: dict[str, list[Entry]] = {name: [] for name in promised}
    for entry in entries:
        tensors.setdefault(entry.key, []).append(entry)
    for key, boxes in tensors.items():
        _require_once(folder, key, boxes)
    index = Metadata(
        {key: _metadata(boxes) for key, boxes in tensors.items()},
        storage_data={
            MetadataIndex(x.key, torch.Size(x.offset)): _StorageInfo(*x.place)
            for boxes in tensors.values()
            for x in boxes
        },
    )
    common = io.BytesIO()
    torch.save({}, common)  # megatron-core wants the file
    kind = json.dumps(dataclasses.asdict(CheckpointingConfig("torch_dist", 1)))
    contents = {COMMON: common.getvalue(), INDEX: pickle.dumps(index), CONFIG_FNAME: kind.encode()}
    files = {}
    for name, data in contents.items():
        with HashingFile(folder / name) as file:
            file.write(data)
        files[name] = file.facts
    return files


def _require_once(folder: Path, key: str, boxes: Sequence[Entry]) -> None:
    shapes = {entry.shape for entry in boxes}
    numbers = sum(math.prod(entry.size) for entry in boxes)
    places = {entry.offset for entry in boxes}
    if len(shapes) != 1 or len(places) < len(boxes) or numbers != math.prod(boxes[0].shape):
        raise CheckpointError(
            f"{folder}: the ranks wrote {numbers} numbers of {key}, of shapes {sorted(shapes)}; "
            "wanted each number exactly once. Please report this with the run's layout"
        )


def _metadata(boxes: Sequence[Entry]) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        TensorProperties(dtype=boxes[0].dtype),
        torch.Size(boxes[0].shape),
        [ChunkStorageMetadata(torch.Size(x.offset), torch.Size(x.size)) for x in boxes],
    )


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
