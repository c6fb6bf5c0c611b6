"""Weights on disk: a lazy reader of a folder's files, and small helpers.

safetensors files are read wherever there are any. Pickled weights (``.bin``, ``.pt``) can hold
code, so they are opened with ``weights_only``: anything but plain tensors is refused. No file
outside the folder is ever read, whatever an index or a link says.
"""

import json
import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_asvr.errors import ConversionError
from megatron_asvr.parallel.stored import Stored, open_safetensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLES = (".bin", ".pt", ".pth")


def open_weights(path: Path, single: str = SINGLE) -> dict[str, Stored]:
    """All tensors of a folder, or of one file, by name; numbers are read on demand.

    Args:
        path: a folder with ``model.safetensors`` or an index and its shards (or the same with
            ``pytorch_model.bin``), or one such file.
        single: another name for the folder's single file.

    Raises:
        ConversionError: no weights, a damaged file, an index that does not fit its files or leads
            out of the folder, or a pickle that holds more than tensors.
    """
    if path.is_file():
        return _open_file(path)
    files, index = _find(path, single)
    tensors: dict[str, Stored] = {}
    for file in files:
        found = _open_file(_inside(path, file))
        if index is not None:
            _check_index(path / file, set(found), {k for k, f in index.items() if f == file})
        tensors |= found
    return tensors


def _find(folder: Path, single: str) -> tuple[list[str], dict[str, str] | None]:
    """Names of a folder's files of weights, and its index if it has one."""
    if (folder / single).is_file():
        return [single], None
    if single == SINGLE:
        for index in (INDEX, PICKLE_INDEX):
            if (folder / index).is_file():
                known = _read_index(folder / index)
                return sorted(set(known.values())), known
        if (folder / PICKLE).is_file():
            return [PICKLE], None
        single = f"{single}, {INDEX}, {PICKLE}, {PICKLE_INDEX}"
    raise ConversionError(f"{folder} holds no weights; wanted there: {single}")


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    strings = isinstance(index, dict) and all(isinstance(v, str) for v in index.values())
    if not strings or not index:
        raise ConversionError(f"{path}: weight_map must map tensor names to file names")
    ending = ".safetensors" if path.name == INDEX else ".bin"
    for file in set(index.values()):
        # Only a bare file name stays inside the folder.
        if Path(file).name != file or "\\" in file or not file.endswith(ending):
            raise ConversionError(
                f"{path}: {file!r} is not the name of a {ending} file in this folder"
            )
    return index


def _inside(folder: Path, file: str) -> Path:
    """The path of ``file``, once it is known not to lead out of the folder."""
    path, root = folder / file, folder.resolve()
    if not path.is_file():
        raise ConversionError(f"{path} does not exist, but the index names it")
    roots = [root]
    if root.parent.name == "snapshots":  # the hub's cache links to the blobs beside
        roots.append(root.parent.parent / "blobs")
    real = path.resolve()
    if not any(real.is_relative_to(allowed) for allowed in roots):
        raise ConversionError(
            f"{path} is a link out of its folder, to {real}; copy the file itself (cp -L)"
        )
    return path


def _check_index(path: Path, held: set[str], listed: set[str]) -> None:
    odd = sorted(listed ^ held)
    if odd:
        raise ConversionError(
            f"{path} and the index disagree on {len(odd)} tensors, "
            f"e.g. {odd[:3]}; the folder is incomplete or mixed"
        )


def _open_file(path: Path) -> dict[str, Stored]:
    if path.suffix in PICKLES:
        return _open_pickle(path)
    return open_safetensors(path, ConversionError)


class _Pickle:
    """A pickled state dictionary, opened where its first tensor is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: dict[str, Tensor] | None = None

    def __reduce__(self) -> tuple[type["_Pickle"], tuple[Path]]:
        return _Pickle, (self.path,)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, mapped into memory where the format allows it."""
        if self._held is None:
            self._held = _load_pickle(self.path)
        return self._held

    def fill(self, name: str, out: Tensor, start: int) -> None:
        """Fill ``out`` with a tensor's elements from ``start`` on."""
        out.copy_(self.tensors()[name].reshape(-1)[start : start + out.numel()])


def _open_pickle(path: Path) -> dict[str, Stored]:
    file = _Pickle(path)
    return {
        name: Stored(tuple(x.shape), x.dtype, partial(file.fill, name), str(path))
        for name, x in file.tensors().items()
    }


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of an old torch cannot be mapped
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ConversionError(
            f"{path} is damaged, or holds more than tensors, so that opening it could run code; "
            "it is refused. Save the weights as safetensors where they come from"
        ) from e
    except (RuntimeError, EOFError, OSError) as e:
        raise ConversionError(f"{path} is not a complete file of torch.save: {e}") from e
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]
    if not isinstance(held, dict) or not all(isinstance(x, Tensor) for x in held.values()):
        raise ConversionError(f"{path} holds no state dictionary: wanted tensors by name")
    return held


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ConversionError: it is missing, damaged, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
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
    # A sum is fast and not finite when a number is not; it may also overflow.
    if x.is_floating_point() and not x.sum().isfinite() and not x.isfinite().all():
        raise ConversionError(f"{name} holds NaN or infinite values; the weights are damaged")
    return x
