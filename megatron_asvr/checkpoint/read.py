"""A rank's share of a checkpoint, filled while one rank reads each file; see also ``write.py``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed import ProcessGroup

from megatron_asvr.checkpoint.index import Tiled, open_index, overlap
from megatron_asvr.checkpoint.state import Part
from megatron_asvr.errors import CheckpointError
from megatron_asvr.parallel.collectives import gather_objects, on_first
from megatron_asvr.parallel.stored import read_shared


def read(held: Sequence[Part], path: Path, *, group: ProcessGroup) -> None:
    """Fill the memory of a rank's parts from a checkpoint; all ranks take part.

    Args:
        held: of ``parts``.
        path: the checkpoint.
        group: all ranks.

    Raises:
        CheckpointError: on every rank: a file cannot be read, or the checkpoint lacks something.
    """
    index = on_first(lambda: open_index(path), group=group)
    wanted: dict[str, list[Part]] = {}
    for part in held:
        wanted.setdefault(part.key, []).append(part)
    problems = gather_objects(_first_problem(wanted, index), group=group)
    if any(problems):
        raise CheckpointError(f"{path} does not fit this run: {next(filter(None, problems))}")
    with torch.no_grad():
        _fill(wanted, index, group)


def _first_problem(wanted: Mapping[str, list[Part]], index: Mapping[str, Tiled]) -> str | None:
    """What this rank needs and the checkpoint does not hold."""
    for key, parts in wanted.items():
        stored = index.get(key)
        if stored is None:
            return f"it has no {key}"
        for part in parts:
            if part.is_padded:
                continue
            if stored.shape != part.shape:
                return f"{key} has shape {stored.shape}, wanted {part.shape}"
            try:
                stored.region(part.offset, part.size)
            except CheckpointError as err:
                return f"{key}: {err}"
    return None


def _fill(
    wanted: Mapping[str, list[Part]], index: Mapping[str, Tiled], group: ProcessGroup
) -> None:
    """Copy every chunk of the checkpoint into the parts that it overlaps."""
    for parts in wanted.values():
        for part in parts:
            if part.is_padded:  # the checkpoint may hold less of it
                part.memory.zero_()
    chunks = {(key, i): c for key, tiled in index.items() for i, c in enumerate(tiled.chunks)}
    names = {f"{key} #{i}": (key, chunk) for (key, i), chunk in chunks.items()}
    weights = {name: chunk.stored for name, (_, chunk) in names.items()}
    for name, numbers in read_shared(weights, names, group=group):
        key, chunk = names[name]
        for part in wanted.get(key, ()):
            box = overlap(part.offset, part.size, chunk.offset, chunk.stored.shape)
            if box is not None:
                part.memory[box[0]] = numbers[box[1]].to(part.memory)
