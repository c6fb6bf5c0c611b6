"""Tensors on disk, and how all ranks get them while one rank reads each file.

A start of many ranks needs every weight on many of them. Were each rank to open the files, the
storage would answer as many times as there are replicas of the model. So a description of the
tensors travels instead: `Stored` can be pickled, and opens its file only where it is read.
`read_shared` deals the files out to the ranks; all read at the same time, a bucket each, and then
the buckets are broadcast. What goes wrong on the rank that reads is raised on all.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_asvr.errors import AsvrError, CheckpointError
from megatron_asvr.parallel.collectives import broadcast_tensor, device_of, gather_objects

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
CHUNK_BYTES = 1 << 20  # it stays in the cache of a core; measured best among 256 KB to 8 MB
_HEADER_BYTES = 100 << 20  # safetensors allows no longer header
_BUCKET_BYTES = 64 << 20  # read, and held, by a rank at a time; a larger tensor is a bucket
_ALIGNMENT = 16  # of the tensors of a bucket: of the widest type
Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Stored:
    """A tensor on disk, or one that is made of several; it can be sent to another rank.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        fill: ``fill(out, start)`` fills the flat tensor ``out`` with the elements from ``start``
            on; both ends are multiples of a row. Several threads may call it.
        file: where it is; one rank reads all that is wanted of a file.
        made_of: tensors on disk that it is made of; none when it is one itself.
        join: makes it of those.
    """

    shape: Shape
    dtype: torch.dtype
    fill: Callable[[Tensor, int], None]
    file: str = ""
    made_of: tuple["Stored", ...] = ()
    join: Callable[[Sequence[Tensor]], Tensor] | None = None

    @classmethod
    def of(cls, x: Tensor) -> "Stored":
        """A tensor in memory, as if it were on disk."""
        return cls(tuple(x.shape), x.dtype, partial(_copy, x.detach().reshape(-1)))

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def parts(self) -> tuple["Stored", ...]:
        """What has to be read for it, file by file."""
        return self.made_of or (self,)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole tensor, from its parts."""
        return parts[0] if self.join is None else self.join(parts)

    def read(self) -> Tensor:
        """The whole tensor, on the CPU."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.fill(out.view(-1), 0)
        return out

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
        """First element and end of consecutive parts of whole rows, about so many bytes each."""
        number = torch.Size(self.shape).numel()
        if not number:
            yield 0, 0
            return
        row = number // (self.shape[0] if self.shape else 1)
        step = max(1, chunk_bytes // (row * self.dtype.itemsize)) * row
        for start in range(0, number, step):
            yield start, min(start + step, number)


def _copy(flat: Tensor, out: Tensor, start: int) -> None:
    out.copy_(flat[start : start + out.numel()])


def compose(
    shape: Shape,
    dtype: torch.dtype,
    fill: Callable[[Tensor, int], None],
    of: Sequence[Stored],
    join: Callable[[list[Tensor]], Tensor],
) -> Stored:
    """A tensor that ``join`` makes of others, which may be made of others themselves."""
    join = partial(_join_nested, join=join, of=[(len(x.parts), x.join) for x in of])
    return Stored(shape, dtype, fill, "", tuple(leaf for x in of for leaf in x.parts), join)


def _join_nested(
    leaves: Sequence[Tensor],
    join: Callable[[list[Tensor]], Tensor],
    of: Sequence[tuple[int, Callable[[Sequence[Tensor]], Tensor] | None]],
) -> Tensor:
    made, start = [], 0
    for count, make in of:
        parts = leaves[start : start + count]
        made.append(parts[0] if make is None else make(parts))
        start += count
    return join(made)


class File:
    """A file, opened at the first read, which any thread may make anywhere in it.

    It is never mapped: what was read takes no memory. Sent to another rank, it is opened anew.

    Args:
        path: the file.
        error: what is raised when it cannot be read.
    """

    def __init__(self, path: Path, error: type[AsvrError]) -> None:
        self.path, self._error = path, error
        self._descriptor, self._lock = -1, threading.Lock()

    def __reduce__(self) -> tuple[type["File"], tuple[Path, type[AsvrError]]]:
        return File, (self.path, self._error)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, x: Tensor, start: int) -> Tensor:
        """Return the contiguous ``x`` after filling it with the bytes from ``start`` on.

        Raises:
            AsvrError: the file cannot be read, or ends before.
        """
        rest = memoryview(x.reshape(-1).view(torch.uint8).numpy())
        try:
            with self._lock:
                if self._descriptor < 0:
                    self._descriptor = os.open(self.path, os.O_RDONLY)
            while rest:
                number = os.preadv(self._descriptor, [rest], start)
                if number == 0:
                    raise self._error(f"{self.path} became shorter while it was read")
                rest, start = rest[number:], start + number
        except OSError as err:
            raise self._error(f"{self.path} cannot be read: {err.strerror}") from err
        return x


def open_safetensors(path: Path, error: type[AsvrError]) -> dict[str, Stored]:
    """All tensors of a safetensors file by name; its header is read and checked here.

    Args:
        path: the file.
        error: what is raised.

    Raises:
        AsvrError: the file is damaged, or holds numbers of unknown type.
    """
    try:
        begin, header, size = _header(path)
        tensors, ends = {}, [0]
        for name, entry in header.items():
            shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise error(f"{path} holds numbers of unknown type {[entry['dtype']]}")
            dtype = _DTYPES[entry["dtype"]]
            if start < 0 or end - start != torch.Size(shape).numel() * dtype.itemsize:
                raise ValueError(f"the place of {name} does not fit its shape")
            tensors[name] = (shape, dtype, start)
            ends.append(end)
        held = sum(end - start for start, end in (x["data_offsets"] for x in header.values()))
        if not begin + max(ends) == begin + held == size:
            raise ValueError(f"it has {size} bytes; its header asks for {begin + max(ends)}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise error(f"{path} is not a complete safetensors file: {e}") from e
    file = File(path, error)
    return {
        name: Stored(shape, dtype, partial(_fill, file, begin + start), str(path))
        for name, (shape, dtype, start) in tensors.items()
    }


def _header(path: Path) -> tuple[int, dict[str, Any], int]:
    """Where the numbers begin, what there is, and the size of the file."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= min(size - 8, _HEADER_BYTES):
            raise ValueError("its header is cut off")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header, size


def _fill(file: File, begin: int, out: Tensor, start: int) -> None:
    file.read(out, begin + start * out.itemsize)


class Check:
    """A check that is made once, when it is first called.

    Args:
        check: raises an error of ours.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check: Callable[[], None] | None = check

    def __call__(self) -> None:
        """Return when all is well.

        Raises:
            AsvrError: it is not.
        """
        if self._check is not None:
            self._check()
        self._check = None


def run_checks(checks: Sequence[Callable[[], None]], *, group: ProcessGroup | None) -> None:
    """Return when all checks were made, each by one rank of the group.

    Raises:
        AsvrError: on every rank: of the first that failed.
    """
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    problem = None
    try:
        for check in checks[rank::size]:
            check()
    except AsvrError as err:
        problem = err
    _raise_first(problem, group)


def _raise_first(problem: AsvrError | None, group: ProcessGroup | None) -> None:
    """Raise the error of the first rank that has one, on all."""
    for found in gather_objects(problem, group=group):
        if found is not None:
            raise found


_Piece = tuple[str, int, Stored]  # name of a tensor, number of the part, the part


def read_shared(
    weights: Mapping[str, Stored], names: Iterable[str], *, group: ProcessGroup | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of all that is asked for, on every rank; one rank reads a file.

    All ranks bring the same arguments and iterate to the end. The order is that in which tensors
    become complete, the same on all. They are on the device of the group's backend, and views of
    memory that is used for others: whoever keeps one copies it.

    Args:
        weights: what is on disk.
        names: of the tensors that are wanted, each once.
        group: the ranks that take part; None: this process alone.

    Raises:
        AsvrError: on every rank: a tensor cannot be read where its file is read.
    """
    if group is None or group.size() == 1:
        for name in names:
            weight = weights[name]
            yield name, weight.joined([_checked(part) for part in weight.parts])
        return
    waiting: dict[str, dict[int, Tensor]] = {}
    shares = _deal(weights, names, group.size())
    for number in range(max(map(len, shares))):
        buckets = [share[number] if number < len(share) else [] for share in shares]
        mine = _attempt(buckets[group.rank()], group)
        for owner, bucket in enumerate(buckets):
            if not bucket:
                continue
            flat = broadcast_tensor(mine if owner == group.rank() else None, owner, group=group)
            for (name, place, _), x in zip(bucket, _unpack(flat, bucket), strict=True):
                found = waiting.setdefault(name, {})
                found[place] = x
                if len(found) == len(weights[name].parts):
                    del waiting[name]
                    yield name, weights[name].joined([found[i] for i in range(len(found))])
            for name, place, _ in bucket:  # the others wait for parts from another file
                if name in waiting:
                    waiting[name][place] = waiting[name][place].clone()


def _deal(
    weights: Mapping[str, Stored], names: Iterable[str], num_ranks: int
) -> list[list[list[_Piece]]]:
    """What each rank reads: its buckets, in order.

    Who reads a file depends on all files, not on what is wanted of them this time.
    """
    files: dict[str, list[_Piece]] = {
        part.file: [] for weight in weights.values() for part in weight.parts
    }
    for name in names:
        for place, part in enumerate(weights[name].parts):
            files[part.file].append((name, place, part))
    shares: list[list[list[_Piece]]] = [[] for _ in range(num_ranks)]
    for number, file in enumerate(sorted(files)):
        # Few files are spread over the nodes, whose ranks follow one another.
        few = len(files) < num_ranks
        share = shares[number * num_ranks // len(files) if few else number % num_ranks]
        used = _BUCKET_BYTES
        for piece in files[file]:
            size = _size(piece[2])
            if used + size > _BUCKET_BYTES:
                share.append([])
                used = 0
            share[-1].append(piece)
            used += size
    return shares


def _size(part: Stored) -> int:
    """Bytes that a part takes in a bucket."""
    size = torch.Size(part.shape).numel() * part.dtype.itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _attempt(bucket: Sequence[_Piece], group: ProcessGroup) -> Tensor | None:
    """This rank's bucket, read into one buffer, once every rank has read its own."""
    flat, problem = None, None
    try:
        if bucket:
            flat = _pack(bucket).to(device_of(group))
    except AsvrError as err:
        problem = err
    _raise_first(problem, group)
    return flat


def _pack(bucket: Sequence[_Piece]) -> Tensor:
    flat = torch.empty(sum(_size(part) for *_, part in bucket), dtype=torch.uint8)
    for (*_, part), x in zip(bucket, _unpack(flat, bucket), strict=True):
        _into(part, x)
    return flat


def _checked(part: Stored) -> Tensor:
    x = torch.empty(part.shape, dtype=part.dtype)
    _into(part, x)
    return x


def _into(part: Stored, x: Tensor) -> None:
    try:
        part.fill(x.view(-1), 0)
    except AsvrError:
        raise
    except Exception as err:  # whatever it is, the other ranks wait for it
        raise CheckpointError(f"{part.file} cannot be read: {type(err).__name__}: {err}") from err


def _unpack(flat: Tensor, bucket: Sequence[_Piece]) -> Iterator[Tensor]:
    start = 0
    for *_, part in bucket:
        end = start + torch.Size(part.shape).numel() * part.dtype.itemsize
        yield flat[start:end].view(part.dtype).view(part.shape)
        start += _size(part)
