"""The index of a distributed checkpoint, and the tensors behind it, read chunk by chunk.

Every rank that wrote a checkpoint left its chunks of each tensor in a file of its own. The index
says which file holds which chunk, so a tensor, or a region of one, is a few places in a few files.
"""

import functools
import io
import math
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megatron_asvr.errors import CheckpointError
from megatron_asvr.parallel.stored import File, Stored, compose

INDEX = ".metadata"
COMMON = "common.pt"  # what is no tensor and no part of one
_COMMON_OBJECT = "common_state/"  # the same in newer megatron-cores, beside the tensors
OPTIMIZER = "optimizer.state."  # begins the names of its tensors; their kind and weight follow
Shape = tuple[int, ...]
# What megatron-core's optimizers, one or several of them, call a master weight: the distributed
# optimizer and the plain one.
_MASTER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?:param|fp32_param)\.(.+)")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor as one rank wrote it.

    Attributes:
        offset: of its first element in the tensor.
        stored: the part.
    """

    offset: Shape
    stored: Stored


@dataclass(frozen=True, slots=True)
class Tiled:
    """A tensor of a distributed checkpoint.

    Attributes:
        shape: of the whole.
        dtype: of the whole.
        chunks: which together make it up.
    """

    shape: Shape
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    def region(self, start: Shape, size: Shape, *, stacked: int = 0) -> Stored:
        """A box of it.

        Args:
            start: first element of each axis.
            size: number of elements of each axis.
            stacked: so many first axes, of one element each, are left out of the result.

        Raises:
            CheckpointError: the chunks do not cover it exactly once.
        """
        tiles = []
        for chunk in self.chunks:
            box = overlap(start, size, chunk.offset, chunk.stored.shape)
            if box is not None:
                tiles.append((chunk.stored, *box))
        covered = sum(math.prod(x.stop - x.start for x in into) for _, into, _ in tiles)
        if covered != math.prod(size):
            raise CheckpointError(
                f"the chunks of a tensor of shape {self.shape} do not cover {size} of it, from "
                f"{start} on, exactly once; the checkpoint is incomplete"
            )
        return compose(
            size[stacked:],
            self.dtype,
            partial(_fill_box, tiles, size, stacked),
            [stored for stored, *_ in tiles],
            partial(_place, boxes=[box for _, *box in tiles], size=size, stacked=stacked),
        )


Box = tuple[slice, ...]


def overlap(start: Shape, size: Shape, offset: Shape, shape: Shape) -> tuple[Box, Box] | None:
    """Where a chunk goes in a region, and which part of it goes there; None when nothing does.

    Args:
        start: first element of the region on each axis of the tensor.
        size: of the region.
        offset: first element of the chunk.
        shape: of the chunk.
    """
    first = [max(a, b) for a, b in zip(start, offset, strict=True)]
    last = [min(a + n, b + m) for a, n, b, m in zip(start, size, offset, shape, strict=True)]
    if any(a >= b for a, b in zip(first, last, strict=True)):
        return None
    into = tuple(slice(a - s, b - s) for a, b, s in zip(first, last, start, strict=True))
    of = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, offset, strict=True))
    return into, of


def _place(
    parts: Sequence[Tensor], boxes: Sequence[tuple[Box, Box]], size: Shape, stacked: int
) -> Tensor:
    """The region from whole chunks."""
    if len(parts) == 1:
        return parts[0][boxes[0][1]].reshape(size[stacked:])
    whole = parts[0].new_empty(size)
    for part, (into, of) in zip(parts, boxes, strict=True):
        whole[into] = part[of]
    return whole.reshape(size[stacked:])


def _fill_box(
    tiles: Sequence[tuple[Stored, Box, Box]], size: Shape, axis: int, out: Tensor, start: int
) -> None:
    """Fill the flat ``out`` from element ``start`` on of a region with rows along ``axis``."""
    if not out.numel():
        return
    if axis == len(size):
        tiles[0][0].fill(out, 0)
        return
    rows = out.view(-1, *size[axis + 1 :])
    first = start // (out.numel() // len(rows))
    for chunk, into, of in tiles:
        begin, end = max(first, into[axis].start), min(first + len(rows), into[axis].stop)
        if begin >= end:
            continue
        row = math.prod(chunk.shape[axis + 1 :])
        lead = 0
        for number, part in zip(chunk.shape[:axis], of[:axis], strict=True):
            lead = lead * number + part.start
        at = (lead * chunk.shape[axis] + of[axis].start + begin - into[axis].start) * row
        target = rows[(slice(begin - first, end - first), *into[axis + 1 :])]
        if target.is_contiguous() and target.shape[1:] == chunk.shape[axis + 1 :]:
            chunk.fill(target.view(-1), at)
        else:
            block = torch.empty((end - begin, *chunk.shape[axis + 1 :]), dtype=chunk.dtype)
            chunk.fill(block.view(-1), at)
            target.copy_(block[(slice(None), *of[axis + 1 :])])


def open_index(folder: Path) -> dict[str, Tiled]:
    """All tensors of a distributed checkpoint by name. Of the files beside the index none is read.

    Raises:
        CheckpointError: the index is missing, damaged or names foreign classes.
    """
    index = read_index(folder)
    places = {(key.fqn, tuple(key.offset or ())): x for key, x in index.storage_data.items()}
    files: dict[str, File] = {}
    tensors = {}
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        dtype, chunks = entry.properties.dtype, []
        for chunk in entry.chunks:
            offset, shape = tuple(chunk.offsets), tuple(chunk.sizes)
            place = places.get((name, offset))
            if place is None or getattr(place, "transform_descriptors", None):
                why = "is compressed, which is not read here" if place else "lies in no file"
                raise CheckpointError(f"{folder / INDEX}: the part of {name} at {offset} {why}")
            path = str(place.relative_path)
            if Path(path).name != path:
                raise CheckpointError(f"{folder / INDEX} leads out of its folder: {path!r}")
            file = files.setdefault(path, File(folder / path, CheckpointError))
            piece = _Piece(file, place.offset, place.length, shape, dtype)
            fill = partial(_fill, piece)
            chunks.append(Chunk(offset, Stored(shape, dtype, fill, str(folder / path))))
        tensors[name] = Tiled(tuple(entry.size), dtype, tuple(chunks))
    return tensors


def master_weights(index: dict[str, Tiled]) -> dict[str, Tiled]:
    """The fp32 weights that the optimizer keeps of those of lower precision, by their names."""
    return {found[1]: x for key, x in index.items() if (found := _MASTER.fullmatch(key))}


def read_common(folder: Path, *, allowed: Sequence[type] = ()) -> dict[str, Any]:
    """What a checkpoint holds beside tensors; nothing but plain values is unpickled.

    Args:
        folder: the checkpoint.
        allowed: classes that may be in it too.

    Raises:
        CheckpointError: it cannot be read, or holds more than plain values.
    """
    path = folder / COMMON
    try:
        data = path.read_bytes() if path.is_file() else _common_object(folder)
        if foreign := set(get_unsafe_globals_in_checkpoint(io.BytesIO(data))) - {
            f"{kind.__module__}.{kind.__qualname__}" for kind in allowed
        }:
            raise CheckpointError(
                f"{path} is a pickle that names {', '.join(sorted(foreign))}, so that opening it "
                "could run code"
            )
        with safe_globals(list(allowed)):
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return found[0] if isinstance(found, list) else found  # 0.19 saves a list of one object
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as err:
        raise CheckpointError(f"{path} cannot be read: {err}") from None


def _common_object(folder: Path) -> bytes:
    for key, place in read_index(folder).storage_data.items():
        if key.fqn.startswith(_COMMON_OBJECT):
            with (folder / Path(place.relative_path).name).open("rb") as stream:
                stream.seek(place.offset)
                return stream.read(place.length)
    raise CheckpointError(f"{folder} has no {COMMON}")


@dataclass(frozen=True, eq=False, slots=True)
class _Piece:
    """A chunk of a tensor, as one rank wrote it with ``torch.save``.

    Attributes:
        file: that it lies in.
        begin: its first byte there.
        length: in bytes.
        shape: of the chunk.
        dtype: of the chunk.
    """

    file: File
    begin: int
    length: int
    shape: Shape
    dtype: torch.dtype


def _fill(piece: _Piece, out: Tensor, start: int) -> None:
    """Fill the flat ``out`` with the elements of a chunk from ``start`` on."""
    place = _first_byte(piece)
    if place is None:
        out.copy_(_loaded(piece).reshape(-1)[start : start + out.numel()])
    else:
        piece.file.read(out, place + start * piece.dtype.itemsize)


class _Slice(io.RawIOBase):
    """A chunk as a file, for torch."""

    def __init__(self, piece: _Piece) -> None:
        self._piece, self._at = piece, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move, and return the place."""
        self._at = offset + (0, self._at, self._piece.length)[whence]
        return self._at

    def tell(self) -> int:
        """The place."""
        return self._at

    def readinto(self, into: Any) -> int:
        """Read what is left, at most the buffer's size."""
        number = max(0, min(len(into), self._piece.length - self._at))
        if number:
            wanted = torch.frombuffer(into, dtype=torch.uint8, count=number)
            self._piece.file.read(wanted, self._piece.begin + self._at)
        self._at += number
        return number


@functools.lru_cache(maxsize=1 << 16)
def _first_byte(piece: _Piece) -> int | None:
    """Where a chunk's numbers begin in its file, None when they are not one after the other."""
    x = torch.load(_Slice(piece), map_location="meta", weights_only=True)
    if tuple(x.shape) != piece.shape or x.dtype != piece.dtype:
        raise CheckpointError(
            f"{piece.file.path}, byte {piece.begin}: {x.dtype} {list(x.shape)}; the index says "
            f"{piece.dtype} {list(piece.shape)}"
        )
    inside = getattr(x.untyped_storage(), "_checkpoint_offset", None)  # as newer torch tells it
    if inside is None or not x.is_contiguous():
        return None
    return piece.begin + inside + x.storage_offset() * x.itemsize


@functools.lru_cache(maxsize=4)
def _loaded(piece: _Piece) -> Tensor:
    return torch.load(_Slice(piece), map_location="cpu", weights_only=True)


def read_index(folder: Path) -> Metadata:
    """The index itself; it is a pickle, and nothing but an index's own classes is allowed in it.

    Raises:
        CheckpointError: it is missing, damaged or names foreign classes.
    """
    path = folder / INDEX
    try:
        return _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, IndexError) as err:
        raise CheckpointError(f"{path} cannot be read: {err}") from None


# What an index consists of: classes defined in these modules, and a few names beside dtypes.
_INDEX_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
)
_INDEX_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "dict"),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """One of the index's own classes or a dtype.

        Raises:
            pickle.UnpicklingError: anything else.
        """
        if module in _INDEX_MODULES:
            found = super().find_class(module, name)
            # A class defined there, not one of the many things those modules import.
            if isinstance(found, type) and found.__module__ == module:
                return found
        if module.partition(".")[0] == "pathlib" and name == "PosixPath":
            return PurePosixPath  # where it was written; newer Pythons call the module otherwise
        if (module, name) in _INDEX_NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index needs")
