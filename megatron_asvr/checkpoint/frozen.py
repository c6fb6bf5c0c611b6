"""Weights that a stage does not train: written once per run, named by their content.

The file is an ordinary safetensors file of full tensors. It is written tensor by tensor, so no
rank ever holds a whole language model in memory: the header's room is reserved first and filled
in at the end (the format allows trailing spaces in it).
"""

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron_asvr.checkpoint.folder import RunFolder, fsync
from megatron_asvr.errors import CheckpointError
from megatron_asvr.parallel.stored import Stored, open_safetensors

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_READ_BYTES = 1 << 24
_HEADER_BYTES = 100 << 20  # more than any header has: safetensors allows no more either
_ENTRY_BYTES = 160  # a header entry without its name: dtype, up to 5 sizes, two 20-digit offsets


def write_frozen(
    run: RunFolder,
    part: str,
    names: Iterable[str],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    attempt: int,
) -> str:
    """Name of the file that holds one part's frozen weights, after writing it.

    Args:
        run: the run's folder.
        part: e.g. ``vision_encoder``, the first part of the file's name.
        names: the canonical names that ``tensors`` will bring (to reserve the header).
        tensors: canonical name and full tensor on the CPU, one at a time.
        attempt: number of this start.

    Raises:
        CheckpointError: a tensor's type cannot be written, a name was not announced, or a newer
            start of the same run is at work.
    """
    run.frozen.mkdir(parents=True, exist_ok=True)
    partial = run.unfinished(run.frozen / part, attempt)
    room = -(-sum(len(name) + _ENTRY_BYTES for name in names) // 8 + 8) * 8 + 8
    header: dict[str, dict[str, object]] = {}
    content = hashlib.sha256()
    offset = 0
    with partial.open("wb") as stream:
        stream.seek(8 + room)
        for name, tensor in tensors:
            data = _bytes(part, name, tensor)
            entry = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
            content.update(json.dumps([name, entry]).encode())
            content.update(data)
            header[name] = {**entry, "data_offsets": [offset, offset + len(data)]}
            offset += len(data)
            stream.write(data)
        text = json.dumps(header).encode()
        if len(text) > room:
            raise CheckpointError(f"{partial}: more tensors than announced, {len(header)} written")
        stream.seek(0)
        stream.write(struct.pack("<Q", room) + text.ljust(room))
    fsync(partial)
    path = run.frozen / f"{part}-{content.hexdigest()[:16]}.safetensors"
    run.give_name(partial, path, attempt)
    return path.name


def open_frozen(path: Path) -> dict[str, Stored]:
    """Every tensor of a frozen file by its canonical name.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return open_safetensors(path, CheckpointError)
    except CheckpointError as err:
        raise CheckpointError(
            f"{err}. It holds weights that this run does not train; restore it, or start again in "
            "a new run.dir"
        ) from None


def frozen_damage(path: Path) -> str | None:
    """What is wrong with a frozen file; None when its weights are those its name was made from."""
    content = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            (room,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(room, _HEADER_BYTES)))
            for name, entry in header.items():
                start, end = entry.pop("data_offsets")
                content.update(json.dumps([name, entry]).encode())
                stream.seek(8 + room + start)
                left = end - start
                while left and (data := stream.read(min(left, _READ_BYTES))):
                    content.update(data)
                    left -= len(data)
    except OSError as err:
        return f"cannot be read: {err.strerror}"
    except (AttributeError, KeyError, TypeError, ValueError, struct.error):
        return "is damaged: its header cannot be read"
    if path.stem.rpartition("-")[2] != content.hexdigest()[:16]:
        return "is damaged: its name does not fit its contents"
    return None


def _bytes(part: str, name: str, tensor: Tensor) -> memoryview:
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(f"frozen {part}: {name} is {tensor.dtype}, which is not a weight")
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())
