"""A folder of safetensors files that is laid out first and then filled, one tensor at a time.

Names, shapes and types of everything are known before the first number is read, so headers and
index can be written at once, and every part of a tensor has its place, whoever brings it when.
"""

import json
import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from megatron_asvr.errors import ConversionError
from megatron_asvr.hf.files import INDEX, SINGLE, write_json
from megatron_asvr.hf.tables import check_complete
from megatron_asvr.parallel.stored import DTYPE_NAMES

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor goes."""

    file: Path
    offset: int
    shape: Shape
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class ShardWriter:
    """Writes each of the announced tensors once, in any order, from any thread.

    Args:
        folder: gets ``model.safetensors``, or shards and their index.
        tensors: shape and type of every tensor, in the order of the files.
        max_shard_bytes: largest size of a file; a larger tensor gets a file of its own.
        single: name of the file if it is one.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[Shape, torch.dtype]],
        max_shard_bytes: int,
        single: str = SINGLE,
    ) -> None:
        self.total_bytes = sum(_size(*what) for what in tensors.values())
        self._places: dict[str, _Place] = {}
        self._written: Counter[str] = Counter()  # numbers
        self._open: dict[Path, IO[bytes]] = {}
        self._lock = threading.Lock()
        shards = _divide(tensors, max_shard_bytes)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = single
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out(folder / file, {name: tensors[name] for name in names})
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(folder / INDEX, index)

    def _lay_out(self, file: Path, tensors: dict[str, tuple[Shape, torch.dtype]]) -> None:
        """Write the header of ``file`` and reserve its space."""
        # Wide types first, so that every tensor is aligned.
        names = sorted(tensors, key=lambda name: -tensors[name][1].itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name in names:
            shape, dtype = tensors[name]
            offsets[name], end = end, end + _size(shape, dtype)
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offsets[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(file, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            start = opened.tell()
            opened.truncate(start + end)
        for name, offset in offsets.items():
            self._places[name] = _Place(file, start + offset, *tensors[name])

    def add(self, name: str, x: Tensor) -> None:
        """Write one tensor.

        Raises:
            ConversionError: it was not announced, or not like this, or comes twice.
        """
        place = self._place(name, tuple(x.shape), x.dtype)
        if tuple(x.shape) != place.shape:
            raise ConversionError(f"{name} is {x.dtype} {list(x.shape)}; wanted {place}")
        self.put(name, 0, x.detach().cpu().reshape(-1))

    def put(self, name: str, start: int, x: Tensor) -> None:
        """Write the flat part of a tensor that begins with element ``start``.

        Raises:
            ConversionError: it was not announced, or not with this type, or more came than it has.
        """
        place = self._place(name, tuple(x.shape), x.dtype)
        total = torch.Size(place.shape).numel()
        with self._lock:
            if self._written[name] + x.numel() > total or (name in self._written and not total):
                raise ConversionError(f"{name} came twice")
            self._written[name] += x.numel()
            if place.file not in self._open:
                self._open[place.file] = open(place.file, "r+b")  # noqa: SIM115
            file = self._open[place.file].fileno()
        rest = memoryview(x.contiguous().view(torch.uint8).numpy())
        at = place.offset + start * x.itemsize
        while rest:
            number = os.pwrite(file, rest, at)
            rest, at = rest[number:], at + number

    def _place(self, name: str, shape: Shape, dtype: torch.dtype) -> _Place:
        place = self._places.get(name)
        if place is None or dtype != place.dtype:
            wanted = place or "no such tensor"
            raise ConversionError(f"{name} is {dtype} {list(shape)}; wanted {wanted}")
        return place

    def close(self) -> None:
        """Return when every tensor was written.

        Raises:
            ConversionError: some are missing.
        """
        for file in self._open.values():
            file.close()
        self._open.clear()
        wanted = {name: place.shape for name, place in self._places.items()}
        got = {n: s for n, s in wanted.items() if self._written.get(n) == torch.Size(s).numel()}
        check_complete("written weights", got, wanted)


def _size(shape: Shape, dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _divide(
    tensors: Mapping[str, tuple[Shape, torch.dtype]], max_shard_bytes: int
) -> list[list[str]]:
    """Names by file."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, what in tensors.items():
        size = _size(*what)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
