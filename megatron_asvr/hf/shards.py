"""A folder of safetensors files that is laid out first and then filled, one tensor at a time.

Names, shapes and types of everything are known before the first number is read, so headers and
index can be written at once, every tensor has its place, and only one tensor is in memory.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from megatron_asvr.errors import ConversionError
from megatron_asvr.hf.files import DTYPE_NAMES, INDEX, SINGLE, write_json
from megatron_asvr.hf.tables import check_complete

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor goes."""

    file: Path
    offset: int
    shape: Shape
    dtype: torch.dtype


class ShardWriter:
    """Writes each of the announced tensors once, in any order.

    Args:
        folder: gets ``model.safetensors``, or shards and their index.
        tensors: shape and type of every tensor, in the order of the files.
        max_shard_bytes: largest size of a file; a larger tensor gets a file of its own.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[Shape, torch.dtype]],
        max_shard_bytes: int,
    ) -> None:
        self.total_bytes = sum(_size(*what) for what in tensors.values())
        self._places: dict[str, _Place] = {}
        self._written: set[str] = set()
        self._open: dict[Path, IO[bytes]] = {}
        shards = _divide(tensors, max_shard_bytes)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = SINGLE
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
        place = self._places.get(name)
        if place is None or (tuple(x.shape), x.dtype) != (place.shape, place.dtype):
            wanted = "no such tensor" if place is None else f"{place.dtype} {list(place.shape)}"
            raise ConversionError(f"{name} is {x.dtype} {list(x.shape)}; wanted {wanted}")
        if name in self._written:
            raise ConversionError(f"{name} came twice")
        self._written.add(name)
        if place.file not in self._open:
            self._open[place.file] = open(place.file, "r+b")  # noqa: SIM115 (closed by `close`)
        file = self._open[place.file]
        file.seek(place.offset)
        file.write(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Return when every tensor was written.

        Raises:
            ConversionError: some are missing.
        """
        for file in self._open.values():
            file.close()
        wanted = {name: place.shape for name, place in self._places.items()}
        got = {name: shape for name, shape in wanted.items() if name in self._written}
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
