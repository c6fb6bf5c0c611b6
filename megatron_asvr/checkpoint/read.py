"""Every rank's share of a checkpoint, while one rank reads each file: the other half of `write.py`.

megatron-core's own way to load lets every rank read what it needs, and each data-parallel rank
needs the whole optimizer state of its model shard (`fully_reshardable`): the files would be read as
often as there are replicas. Its wrapper that divides this work over the replicas lets each of them
open the same files, and on gloo it does not wait for its broadcasts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process)

import torch
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_asvr.checkpoint.index import Shape, Tiled, open_index, overlap, read_common
from megatron_asvr.errors import CheckpointError
from megatron_asvr.parallel.collectives import gather_objects, on_first
from megatron_asvr.parallel.stored import read_shared


def read(state: dict[str, Any], path: Path, *, group: ProcessGroup) -> dict[str, Any]:
    """A sharded state, filled from a checkpoint; all ranks take part.

    Args:
        state: of ``sharded_state``, which stays as it is, but for the tensors it refers to.
        path: the checkpoint.
        group: all ranks.

    Raises:
        CheckpointError: on every rank: a file cannot be read, or the checkpoint lacks something.
    """
    index, common = on_first(lambda: (open_index(path), read_common(path)), group=group)
    sharded, own, factories = load_preprocess(state)
    merge(common, own)
    sharded, _ = extract_sharded_base(sharded)
    wanted: dict[str, list[ShardedTensor]] = {}
    for x in nested_values(sharded):
        wanted.setdefault(x.key, []).append(x)
    problems = gather_objects(_first_problem(wanted, index), group=group)
    if any(problems):
        raise CheckpointError(f"{path} does not fit this run: {next(filter(None, problems))}")
    _fill(wanted, index, group)
    dict_list_map_inplace(lambda x: x.data if isinstance(x, ShardedTensor) else x, sharded)
    merge(common, sharded)
    return apply_factory_merges(common, factories)


def _first_problem(
    wanted: Mapping[str, list[ShardedTensor]], index: Mapping[str, Tiled]
) -> str | None:
    """What this rank needs and the checkpoint does not hold."""
    for key, shares in wanted.items():
        stored = index.get(key)
        for x in shares:
            if not isinstance(x, ShardedTensor):
                return f"{key} is no tensor"
            if stored is None:
                return f"it has no {key}"
            if x.allow_shape_mismatch:  # padded vocabularies
                continue
            if stored.shape != tuple(x.global_shape):
                return f"{key} has shape {stored.shape}, wanted {tuple(x.global_shape)}"
            try:
                stored.region(tuple(x.global_offset), _size(x))
            except CheckpointError as err:
                return f"{key}: {err}"
    return None


def _size(x: ShardedTensor) -> Shape:
    """Size of a share in the whole tensor, which may have axes that the share has not."""
    return (1,) * x.prepend_axis_num + tuple(x.local_shape)


def _fill(
    wanted: Mapping[str, list[ShardedTensor]], index: Mapping[str, Tiled], group: ProcessGroup
) -> None:
    """Copy every chunk of the checkpoint into the shares that it overlaps."""
    targets: dict[str, list[tuple[ShardedTensor, Tensor]]] = {}
    for key, shares in wanted.items():
        targets[key] = [(x, _memory(x)) for x in shares]
    chunks = {(key, i): c for key, tiled in index.items() for i, c in enumerate(tiled.chunks)}
    names = {f"{key} #{i}": (key, chunk) for (key, i), chunk in chunks.items()}
    weights = {name: chunk.stored for name, (_, chunk) in names.items()}
    for name, part in read_shared(weights, names, group=group):
        key, chunk = names[name]
        for x, memory in targets.get(key, ()):
            box = overlap(tuple(x.global_offset), _size(x), chunk.offset, chunk.stored.shape)
            if box is not None:
                memory[box[0]] = part[box[1]].to(memory.dtype)


def _memory(x: ShardedTensor) -> Tensor:
    """Where a share goes, as a view with the axes of the whole tensor."""
    if x.data is None:
        x.init_data("cpu", init_fn=torch.zeros)
    else:
        x.data = x.data.detach()
        if x.allow_shape_mismatch:
            x.data.zero_()
    return x.data.view(_size(x))
