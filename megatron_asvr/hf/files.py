"""safetensors on disk: a lazy reader of a folder's shards, and a writer that fills shards in turn.

Only safetensors is read. Pickles can run code when opened, so they are refused, not converted.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_asvr.errors import ConversionError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class TensorFolder:
    """Names, shapes and tensors of a folder's safetensors files, read on demand.

    Args:
        folder: holds ``model.safetensors``, or an index and its shards.
        single: another name for the single file.

    Raises:
        ConversionError: no safetensors, a damaged file, or an index that does not fit its shards.
    """

    def __init__(self, folder: Path, single: str = SINGLE) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Any] = {}
        for file in self._shard_names(single):
            self._open(file)

    def read(self, name: str) -> Tensor:
        """The tensor called ``name``, on the CPU."""
        return self._files[name].get_tensor(name)

    def _shard_names(self, single: str) -> list[str]:
        if (self.folder / single).is_file():
            return [single]
        if single != SINGLE or not (self.folder / INDEX).is_file():
            pickles = sorted(p.name for p in self.folder.glob("*.bin"))[:3]
            hint = f" (pickled weights such as {pickles} are never opened)" if pickles else ""
            raise ConversionError(
                f"{self.folder}: neither {single} nor {INDEX} is there{hint}; "
                "save the model with safe_serialization=True"
            )
        self._index = self._read_index()
        return sorted(set(self._index.values()))

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        index = read_json(path).get("weight_map")
        strings = isinstance(index, dict) and all(isinstance(v, str) for v in index.values())
        if not strings or not index:
            raise ConversionError(f"{path}: weight_map must map tensor names to file names")
        for file in set(index.values()):
            # Only a bare file name stays inside the folder.
            if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
                raise ConversionError(
                    f"{path}: {file!r} is not the name of a safetensors file in this folder"
                )
        return index

    def _open(self, file: str) -> None:
        path = self.folder / file
        if not path.is_file():
            raise ConversionError(f"{path} does not exist, but {INDEX} names it")
        try:
            handle = safe_open(str(path), framework="pt")
            shapes = {k: tuple(handle.get_slice(k).get_shape()) for k in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as e:
            raise ConversionError(f"{path} is not a complete safetensors file: {e}") from e
        index = getattr(self, "_index", None)
        if index is not None:
            self._check_index(file, shapes, index)
        self.shapes |= shapes
        self._files |= dict.fromkeys(shapes, handle)

    def _check_index(self, file: str, shapes: dict, index: dict[str, str]) -> None:
        listed = {name for name, f in index.items() if f == file}
        odd = sorted(listed ^ shapes.keys())
        if odd:
            raise ConversionError(
                f"{self.folder / file} and {INDEX} disagree on {len(odd)} tensors, "
                f"e.g. {odd[:3]}; the folder is incomplete or mixed"
            )


class ShardWriter:
    """Writes named tensors into shards of at most ``max_shard_bytes``, then the index.

    A tensor that is larger than that gets a shard of its own.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self.total_bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, name: str, x: Tensor) -> None:
        """Take one tensor; a full shard is written at once, so memory holds one shard."""
        size = x.numel() * x.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        # A copy: parts of one storage cannot be saved side by side.
        self._pending[name] = x.detach().cpu().clone(memory_format=torch.contiguous_format)
        self._pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        path = self.folder / f"shard-{len(self._shards) + 1:05d}.safetensors"
        save_tensors(path, self._pending)
        self._shards.append((path, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0

    def close(self) -> None:
        """Write what is left, give the shards their final names and write the index if needed."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._shards[0][0].rename(self.folder / SINGLE)
            return
        weight_map = {}
        for i, (path, names) in enumerate(self._shards, 1):
            final = f"model-{i:05d}-of-{count:05d}.safetensors"
            path.rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_json(self.folder / INDEX, index)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file of contiguous tensors, marked as PyTorch's."""
    save_file(tensors, str(path), {"format": "pt"})


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ConversionError: it is missing, damaged, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConversionError(f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds a {type(value).__name__}; wanted a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as indented JSON with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def sync(folder: Path) -> None:
    """Force every file below ``folder``, and the folder itself, to disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_finite(name: str, x: Tensor) -> Tensor:
    """Return ``x``.

    Raises:
        ConversionError: it holds NaN or an infinity.
    """
    if not torch.isfinite(x).all():
        raise ConversionError(f"{name} holds NaN or infinite values; the weights are damaged")
    return x
