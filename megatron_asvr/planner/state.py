"""Bytes of weights, gradients and optimizer state of a rank, exact to the last padding.

Source: megatron-core 0.16.1 and 0.19.2, distributed/param_and_grad_buffer.py (where a parameter
starts and a bucket ends), optimizer/distrib_optimizer.py (the range of a rank) and
optimizer/optimizer.py (which copies there are); tests/unit/test_planner_state.py compares with it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_asvr.config.layout import data_parallel
from megatron_asvr.config.schema import Config
from megatron_asvr.planner.shards import Chunk, Shard

FP32 = 4  # bytes: gradients are summed, and weights are updated, in fp32
MOMENTS = 2  # AdamW's
PARAMETER_STARTS, BUCKET_ENDS = 64, 128  # elements: multiples under the distributed optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a rank keeps from step to step, in bytes.

    Attributes:
        weights: in the precision of the run.
        constants: codebooks, and an online tokenizer.
        gradients: fp32.
        optimizer: fp32 copies of the weights where these have another precision, and two moments.
        parameters: elements held, padding included.
        trained: of these, elements with a gradient.
    """

    weights: int
    constants: int
    gradients: int
    optimizer: int
    parameters: int
    trained: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.constants + self.gradients + self.optimizer


def state(chunks: Sequence[Chunk], config: Config, world: int, *, replica: int = 0) -> State:
    """State of a rank.

    Args:
        chunks: of the rank.
        config: the run, checked.
        world: number of ranks.
        replica: place among the ranks that share the optimizer's state (of experts: the first).
    """
    p, distributed = config.parallel, config.train.optim.distributed
    dp = data_parallel(p, world)
    same = dp * p.cp
    # megatron-core has several buckets on the first stage only.
    several = config.train.optim.overlap_grad_reduce and chunks[0].images
    most = bucket_size(dp) if several else math.inf
    frozen = [s for chunk in chunks for s in chunk.shards if not s.trained]
    weights = sum(s.numbers * s.width for s in frozen)
    gradients = optimizer = 0
    for shards in _buffers(chunks):
        ranks = same * p.tp // p.ep if shards[0].is_expert else same
        here = 0 if shards[0].is_expert else replica
        share = (ranks, here) if distributed else (1, 0)
        size, owned = _buffer(_buckets(shards, most), *share, padded=distributed)
        width = shards[0].width
        weights += size * width
        gradients += size * FP32
        # An fp32 weight is updated where it stands.
        optimizer += owned * FP32 * (MOMENTS + (width != FP32))
    every = [s for chunk in chunks for s in chunk.shards]
    return State(
        weights=weights,
        constants=sum(chunk.constants for chunk in chunks),
        gradients=gradients,
        optimizer=optimizer,
        parameters=sum(s.numbers for s in every),
        trained=sum(s.numbers for s in every if s.trained),
    )


def _buffers(chunks: Sequence[Chunk]) -> Iterator[list[Shard]]:
    """The trained shards of every buffer: one for each chunk, precision and kind of parameter."""
    for chunk in chunks:
        trained = [s for s in chunk.shards if s.trained]
        for _, shards in groupby(sorted(trained, key=_kind), key=_kind):
            yield list(shards)


def _kind(shard: Shard) -> tuple[bool, int]:
    return shard.is_expert, shard.width


def _buffer(
    buckets: Iterable[list[Shard]], ranks: int, replica: int, *, padded: bool
) -> tuple[int, int]:
    """Elements of a buffer, and how many of its parameters' elements one of ``ranks`` updates."""
    size = owned = 0
    for bucket in buckets:
        spans, end = [], 0
        for shard in bucket:
            start = _up(end, PARAMETER_STARTS) if padded else end
            end = start + shard.numbers
            spans.append((start, end))
        length = _up(end, math.lcm(ranks, BUCKET_ENDS)) if padded else end
        first, last = (length * place // ranks for place in (replica, replica + 1))
        owned += sum(max(0, min(stop, last) - max(start, first)) for start, stop in spans)
        size += length
    return size, owned


def bucket_size(dp: int) -> int:
    """Elements after which a bucket ends, where gradients are summed during the backward pass.

    Args:
        dp: data-parallel degree.
    """
    return max(40_000_000, 1_000_000 * dp)


def _buckets(shards: Sequence[Shard], most: float) -> Iterator[list[Shard]]:
    """Parameters that are reduced together, last ones first; a tied weight is alone."""
    bucket: list[Shard] = []
    end = 0
    for shard in reversed(shards):
        if shard.is_shared and bucket:
            yield bucket
            bucket, end = [], 0
        bucket.append(shard)
        end = _up(end, PARAMETER_STARTS) + shard.numbers
        if shard.is_shared or end >= most:
            yield bucket
            bucket, end = [], 0
    if bucket:
        yield bucket


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
