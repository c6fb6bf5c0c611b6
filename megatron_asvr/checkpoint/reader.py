"""Read the weights of a finished or running run, tensor by tensor, without building its model."""

import functools
import io
import math
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from megatron_asvr.checkpoint.folder import META, RunFolder
from megatron_asvr.checkpoint.frozen import frozen_damage, open_frozen
from megatron_asvr.checkpoint.meta import Meta, damage, read_meta
from megatron_asvr.checkpoint.tensors import File, Stored
from megatron_asvr.config.load import from_dict
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import CheckpointError


class Weights:
    """The weights of a checkpoint; calling it with a canonical name gives the full tensor or None.

    A call verifies a file before it takes the first tensor from it. Whoever reads ``stored`` itself
    trusts nothing before all ``checks`` have been called.

    Attributes:
        stored: every weight by canonical name, without padding, in the type it was trained in.
        checks: functions, each of which reads one file and raises CheckpointError if it is damaged.
    """

    def __init__(self) -> None:
        self.stored: dict[str, Stored] = {}
        self.checks: list[Callable[[], None]] = []
        self._checks_of: dict[str, list[Callable[[], None]]] = {}

    def add(self, tensors: Mapping[str, Stored], check: Callable[[], None]) -> None:
        """Add tensors, or parts of them, that lie in the file of ``check``."""
        self.stored |= tensors
        self.checks.append(check)
        for name in tensors:
            self._checks_of.setdefault(name, []).append(check)

    def __call__(self, name: str) -> Tensor | None:
        """The full tensor called ``name``, on the CPU, or None."""
        if name not in self.stored:
            return None
        for check in self._checks_of[name]:
            check()
        return self.stored[name].read()


def read_run(path: str | Path) -> tuple[Config, Weights]:
    """A run's configuration, and its weights, which are read when asked for.

    Args:
        path: a run folder (its newest checkpoint is read) or one of its checkpoints.

    Raises:
        CheckpointError: there is no complete checkpoint, or a file of it is missing.
    """
    step = find_checkpoint(Path(path))
    meta = read_meta(step)
    weights = Weights()
    if meta.trained:
        _add_trained(weights, step, meta)
    for name in meta.frozen.values():
        file = frozen_folder(step) / name
        weights.add(open_frozen(file), functools.cache(partial(_check_frozen, file)))
    return from_dict(meta.config), weights


def weight_names(step: Path) -> list[str]:
    """Canonical names of all weights of a checkpoint, those that are not trained too."""
    meta = read_meta(step)
    frozen = [
        name for file in meta.frozen.values() for name in open_frozen(frozen_folder(step) / file)
    ]
    return sorted({*meta.trained, *frozen})


def frozen_folder(step: Path) -> Path:
    """Where the weights lie that the run of a checkpoint does not train."""
    return step / "../../frozen"


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest one of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    if (path / META).is_file():
        return path
    folder = RunFolder(path)
    latest = folder.latest()
    if latest is None:
        raise CheckpointError(
            f"{path} is neither a complete checkpoint nor a run folder with one; wanted a folder "
            f"with {META}, or with {folder.checkpoints.name}/step_N/{META}"
        )
    return folder.step(latest)


def _check_frozen(path: Path) -> None:
    if (problem := frozen_damage(path)) is not None:
        raise CheckpointError(f"{path} {problem}; restore it from a copy")


def _check_trained(step: Path, meta: Meta, file: str) -> None:
    if problems := damage(step, meta, [file]):
        raise CheckpointError(f"{step / file} {problems[file]}; use another checkpoint")


def _add_trained(weights: Weights, step: Path, meta: Meta) -> None:
    pieces = _pieces(step, meta.trained)
    missing = [name for name in meta.trained if name not in pieces]
    if missing:
        raise CheckpointError(f"{step} promises {missing[0]} in its {META} but does not hold it")
    tensors = {
        name: Stored(tuple(shape), pieces[name][0].dtype, partial(_fill, pieces[name], shape))
        for name, shape in meta.trained.items()
    }
    by_file: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        for piece in pieces[name]:
            by_file.setdefault(piece.file.path.name, {})[name] = tensor
    for file in sorted(by_file, key=lambda name: -meta.files[name]["bytes"]):  # longest first
        weights.add(by_file[file], functools.cache(partial(_check_trained, step, meta, file)))


@dataclass(frozen=True, eq=False, slots=True)
class _Piece:
    """A block of a tensor, as one rank wrote it with ``torch.save``.

    Attributes:
        file: that it lies in.
        begin: its first byte there.
        length: in bytes.
        offsets: of the block in the tensor.
        sizes: of the block.
        dtype: of the tensor.
    """

    file: File
    begin: int
    length: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype

    def read_rows(self, first: int, out: Tensor) -> None:
        """Fill ``out`` with the block's rows from ``first`` on."""
        place = _place(self)
        if place is None:
            out.copy_(_loaded(self)[first : first + len(out)] if self.sizes else _loaded(self))
        else:
            row = math.prod(self.sizes[1:]) * self.dtype.itemsize
            self.file.read(out, place + first * row)


class _Slice(io.RawIOBase):
    """A piece as a file, for torch."""

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
def _place(piece: _Piece) -> int | None:
    """First byte of a piece's numbers in its file, None when they are not row after row."""
    x = torch.load(_Slice(piece), map_location="meta", weights_only=True)
    if tuple(x.shape) != piece.sizes or x.dtype != piece.dtype:
        raise CheckpointError(
            f"{piece.file.path}, byte {piece.begin}: {x.dtype} {list(x.shape)}; the index says "
            f"{piece.dtype} {list(piece.sizes)}"
        )
    inside = getattr(x.untyped_storage(), "_checkpoint_offset", None)  # as newer torch tells it
    if inside is None or not x.is_contiguous():
        return None
    return piece.begin + inside + x.storage_offset() * x.itemsize


@functools.lru_cache(maxsize=4)
def _loaded(piece: _Piece) -> Tensor:
    return torch.load(_Slice(piece), map_location="cpu", weights_only=True)


def _pieces(step: Path, names: Iterable[str]) -> dict[str, list[_Piece]]:
    """The blocks that cover each of some tensors of a checkpoint."""
    index = SafeReader(step).read_metadata()
    files: dict[str, File] = {}
    found: dict[str, list[_Piece]] = {}
    for name in names:
        entry = index.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            continue
        for chunk in entry.chunks:
            place = index.storage_data[MetadataIndex(name, chunk.offsets)]
            if getattr(place, "transform_descriptors", None):
                raise CheckpointError(f"{step}: {name} is stored in an unknown, transformed way")
            if place.relative_path not in files:
                files[place.relative_path] = File(step / place.relative_path, CheckpointError)
            piece = _Piece(
                file=files[place.relative_path],
                begin=place.offset,
                length=place.length,
                offsets=tuple(chunk.offsets),
                sizes=tuple(chunk.sizes),
                dtype=entry.properties.dtype,
            )
            found.setdefault(name, []).append(piece)
        held = sum(math.prod(piece.sizes) for piece in found.get(name, ()))
        if held != entry.size.numel():
            raise CheckpointError(f"{step}: {held} of {entry.size.numel()} numbers of {name}")
    return found


def _fill(pieces: list[_Piece], shape: Sequence[int], out: Tensor, start: int) -> None:
    """Fill the flat ``out`` from element ``start`` on of a tensor cut to ``shape``."""
    if not out.numel():
        return
    if not shape:
        pieces[0].read_rows(0, out.view(()))
        return
    rows_out = out.view(-1, *shape[1:])
    first = start // (out.numel() // len(rows_out))
    for piece in pieces:
        begin = max(first, piece.offsets[0])
        end = min(first + len(rows_out), piece.offsets[0] + piece.sizes[0])
        ends = [min(o + n, m) for o, n, m in zip(piece.offsets, piece.sizes, shape, strict=True)]
        inner = [slice(o, e) for o, e in zip(piece.offsets, ends, strict=True)][1:]
        if begin >= end or any(part.start >= part.stop for part in inner):
            continue  # elsewhere, or all of it padding
        target = rows_out[(slice(begin - first, end - first), *inner)]
        at = begin - piece.offsets[0]
        if target.is_contiguous() and target.shape[1:] == piece.sizes[1:]:
            piece.read_rows(at, target)
        else:
            block = torch.empty((end - begin, *piece.sizes[1:]), dtype=piece.dtype)
            piece.read_rows(at, block)
            target.copy_(block[(slice(None), *(slice(p.stop - p.start) for p in inner))])


class SafeReader(FileSystemReader):
    """torch's reader of a distributed checkpoint, for folders that others may have written.

    The tensors themselves are read with ``weights_only``; the index beside them is a pickle, so
    it is unpickled here with nothing but the index's own classes allowed, and once.
    """

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the checkpoint.

        Raises:
            CheckpointError: it is missing, damaged or names foreign classes.
        """
        if self._index is None:
            path = Path(self.path) / ".metadata"
            try:
                self._index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
            except (OSError, EOFError, pickle.UnpicklingError, AttributeError, IndexError) as err:
                raise CheckpointError(f"{path} cannot be read: {err}") from None
            self._index.storage_meta = self._index.storage_meta or StorageMeta()
        self._index.storage_meta.load_id = self.load_id
        return self._index


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
        if (module, name) in _INDEX_NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index needs")
