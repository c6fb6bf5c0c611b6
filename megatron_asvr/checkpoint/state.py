"""What a checkpoint holds, as this rank sees it: boxes of full tensors, and where it keeps them.

Every rank knows the place of its weights in the full tensors, and of its share of the optimizer's
state, so nothing is gathered when a run is saved, and a checkpoint of one layout can be read in
another. Layers are stored under their own names (``non_homogeneous_layers``), so keys are the
canonical parameter names; the optimizer's tensors have them behind ``optimizer.state.KIND.``.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process)

from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer
from torch import Tensor, nn

from megatron_asvr.checkpoint.index import OPTIMIZER, Shape
from megatron_asvr.precision.fp8.weights import numbers_of

_METADATA = {"non_homogeneous_layers": True}


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """A box of a tensor.

    Attributes:
        key: name of the tensor in the checkpoint.
        shape: of the whole tensor.
        offset: of the box's first element.
        memory: the numbers of the box, with all axes of the whole; a view of what trains.
        is_main: whether this rank writes it; other ranks may hold the same.
        is_padded: the whole may have another length in another layout.
    """

    key: str
    shape: Shape
    offset: Shape
    memory: Tensor
    is_main: bool
    is_padded: bool

    @property
    def size(self) -> Shape:
        """Of the box."""
        return tuple(self.memory.shape)


@dataclass(frozen=True, eq=False, slots=True)
class _Block:
    """A run of a parameter's numbers that is one box of the full tensor.

    Attributes:
        start: place of the first one in the parameter.
        sharded: megatron-core's description of the box.
    """

    start: int
    sharded: ShardedTensor

    @property
    def size(self) -> Shape:
        """Of the box, with all axes of the full tensor."""
        x = self.sharded
        return (1,) * x.prepend_axis_num + tuple(x.local_shape)


def trained_numbers(chunks: Sequence[nn.Module]) -> dict[nn.Parameter, Tensor]:
    """The numbers of every trained weight: where they are, or of one in 8 bits a copy."""
    every = [param for chunk in chunks for param in chunk.parameters() if param.requires_grad]
    return {param: numbers_of(param) for param in every}


def parts(
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer,
    numbers: Mapping[nn.Parameter, Tensor] | None = None,
) -> list[Part]:
    """All trained weights, scales of products in 8 bits and the optimizer's state on this rank.

    Args:
        chunks: the bare model of this rank; each has megatron-core's ``sharded_state_dict``.
        optimizer: made from it; state that is created by its first step is created here.
        numbers: of ``trained_numbers``, for who wants to write to copies.
    """
    numbers = trained_numbers(chunks) if numbers is None else numbers
    found, blocks = [], {}
    for chunk in chunks:
        places = chunk.sharded_state_dict(metadata=_METADATA)
        for name, param in chunk.named_parameters():
            if param.requires_grad:
                blocks[param] = _blocks(numbers[param], places[name])
                found += _parts(numbers[param], 0, blocks[param], "", is_shared=False)
        if (watched := getattr(chunk, "watched", None)) is not None:
            found += [_whole(*kept) for kept in watched.state()]
    for param, start, state in _optimizer_state(optimizer):
        for kind, share in state.items():
            if not _same_memory(share, param):
                prefix = f"{OPTIMIZER}{kind}."
                found += _parts(share, start, blocks[param], prefix, is_shared=True)
    return found


def _whole(key: str, numbers: Tensor, is_main: bool) -> Part:
    """A tensor that is not split over ranks."""
    shape = tuple(numbers.shape)
    return Part(key, shape, (0,) * len(shape), numbers, is_main, is_padded=False)


def _blocks(numbers: Tensor, place: ShardedTensor | ShardedTensorFactory) -> list[_Block]:
    """Where the numbers of a parameter belong; halves of a packed projection lie apart."""
    place = dataclasses.replace(place, data=numbers)  # one in 8 bits does not tell its offsets
    made = place.build() if isinstance(place, ShardedTensorFactory) else [place]
    first = numbers.storage_offset()
    assert all(x.data.is_contiguous() for x in made)
    return [_Block(x.data.storage_offset() - first, x) for x in made]


def _parts(
    numbers: Tensor, start: int, blocks: Sequence[_Block], prefix: str, *, is_shared: bool
) -> Iterator[Part]:
    """Boxes of a run of numbers of a parameter.

    Args:
        numbers: of them, or as many moments.
        start: place of the first one in the parameter.
        blocks: of the parameter.
        prefix: of the keys.
        is_shared: data-parallel ranks divide the numbers among them, and do not hold all of them.
    """
    flat = numbers.detach().view(-1)
    for block in blocks:
        x, size = block.sharded, block.size
        first = max(start, block.start)
        last = min(start + len(flat), block.start + math.prod(size))
        replica = (*x.replica_id[:-1], 0) if is_shared else x.replica_id
        for offset, box in boxes(size, first - block.start, last - block.start):
            count = math.prod(box)
            yield Part(
                key=prefix + x.key,
                shape=tuple(x.global_shape),
                offset=tuple(a + b for a, b in zip(x.global_offset, offset, strict=True)),
                memory=flat[first - start : first - start + count].view(box),
                is_main=is_main_replica(replica),
                is_padded=x.allow_shape_mismatch,
            )
            first += count


def boxes(size: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """Offset and size of the fewest boxes that hold a run of a tensor's numbers, in their order.

    Args:
        size: of the tensor.
        start: place of the first number in the flat tensor.
        stop: place behind the last one.
    """
    if start >= stop:
        return
    if len(size) <= 1:
        yield (start,) * len(size), (stop - start,) * len(size)
        return
    row = math.prod(size[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # all inside of one row
        yield from _in_row(size, last, start, stop)
        return
    yield from _in_row(size, first - 1, start, first * row)
    if first < last:
        yield (first, *(0,) * (len(size) - 1)), (last - first, *size[1:])
    yield from _in_row(size, last, last * row, stop)


def _in_row(size: Shape, index: int, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    row = math.prod(size[1:])
    for offset, box in boxes(size[1:], start - index * row, stop - index * row):
        yield (index, *offset), (1, *box)


def _optimizer_state(
    optimizer: ChainedOptimizer,
) -> Iterator[tuple[nn.Parameter, int, dict[str, Tensor]]]:
    """A parameter, where in it this rank's share begins, and the share's numbers by kind."""
    for one in optimizer.chained_optimizers:
        if getattr(one, "is_stub_optimizer", False):
            continue
        one.init_state_fn(one.optimizer, one.config)
        for param, start, main in _main_weights(one):
            state = {kind: x for kind, x in one.optimizer.state[main].items() if x.dim()}
            yield param, start, {"param": main, **state}


def _main_weights(
    one: DistributedOptimizer | MegatronOptimizer,
) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
    """A parameter, where this rank's share of it begins, and the fp32 weights of the share."""
    groups = one.optimizer.param_groups
    if hasattr(one, "gbuf_ranges"):  # the distributed optimizer
        for param, (group, place) in one.model_param_group_index_map.items():
            share = one._get_model_param_range_map(param)["param"]
            yield param, share.start, groups[group]["params"][place]
        return
    rounded = {}
    for low, full in zip(
        getattr(one, "float16_groups", ()),
        getattr(one, "fp32_from_float16_groups", ()),
        strict=True,
    ):
        rounded |= dict(zip(full, low, strict=True))
    for group in groups:
        for main in group["params"]:
            yield rounded.get(main, main), 0, main


def _same_memory(numbers: Tensor, param: nn.Parameter) -> bool:
    """Whether fp32 weights are those of the model itself."""
    storage = numbers.untyped_storage().data_ptr()
    return numbers.dtype == param.dtype and storage == param.untyped_storage().data_ptr()


def set_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Tell an optimizer whose state was filled how many steps are done."""
    for group in optimizer.param_groups:
        group["step"] = step
