"""Tensors on disk that are read part by part, and never mapped: what was read takes no memory."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_asvr.errors import AsvrError

Shape = tuple[int, ...]
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


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor on disk.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        fill: ``fill(out, start)`` fills the flat tensor ``out`` with the elements from ``start``
            on; both ends are multiples of a row. Several threads may call it.
    """

    shape: Shape
    dtype: torch.dtype
    fill: Callable[[Tensor, int], None]

    @classmethod
    def of(cls, x: Tensor) -> "Stored":
        """A tensor in memory, as if it were on disk."""
        flat = x.detach().reshape(-1)
        return cls(tuple(x.shape), x.dtype, lambda out, start: _copy(flat, out, start))

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

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


class File:
    """An open file, read anywhere by any thread.

    Args:
        path: the file.
        error: what is raised when it ends too soon.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, error: type[AsvrError]) -> None:
        self._descriptor = -1
        self.path, self._error = path, error
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, x: Tensor, start: int) -> Tensor:
        """Return the contiguous ``x`` after filling it with the bytes from ``start`` on."""
        rest = memoryview(x.reshape(-1).view(torch.uint8).numpy())
        while rest:
            number = os.preadv(self._descriptor, [rest], start)
            if number == 0:
                raise self._error(f"{self.path} became shorter while it was read")
            rest, start = rest[number:], start + number
        return x


def open_safetensors(path: Path, error: type[AsvrError]) -> dict[str, Stored]:
    """All tensors of a file by name.

    Args:
        path: the file.
        error: what is raised.

    Raises:
        AsvrError: the file is damaged, or holds numbers of unknown type.
    """
    try:
        with safe_open(str(path), framework="pt"):
            pass  # the library checks the header against the file
        file = File(path, error)
        length = int.from_bytes(file.read(torch.empty(8, dtype=torch.uint8), 0).tolist(), "little")
        header = json.loads(bytes(file.read(torch.empty(length, dtype=torch.uint8), 8).numpy()))
    except (SafetensorError, OSError) as e:
        raise error(f"{path} is not a complete safetensors file: {e}") from e
    header.pop("__metadata__", None)
    unknown = {entry["dtype"] for entry in header.values()} - _DTYPES.keys()
    if unknown:
        raise error(f"{path} holds numbers of unknown type {sorted(unknown)}")
    tensors = {}
    for name, entry in header.items():
        dtype, begin = _DTYPES[entry["dtype"]], 8 + length + entry["data_offsets"][0]
        tensors[name] = Stored(tuple(entry["shape"]), dtype, partial(_fill, file, begin))
    return tensors


def _fill(file: File, begin: int, out: Tensor, start: int) -> None:
    file.read(out, begin + start * out.itemsize)
