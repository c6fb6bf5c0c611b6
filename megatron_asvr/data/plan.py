"""Who computes what of a global batch: a pure function of its samples and the number of ranks.

The samples of a step are an ordered list (order.py). Its items are packed sequences of their rows,
or, without packing, the samples themselves. Items are dealt to the data-parallel ranks so that the
modelled operations of all ranks come out even; every rank has the same number of micro-batches,
with empty ones where it has fewer items. None of this changes a result, only who computes it:
losses are divided by the counts of the whole batch. ``loss.mode=official`` averages over
micro-batches instead, so there items are dealt by count, in order.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_asvr.config.schema import Config
from megatron_asvr.data.packing import pack
from megatron_asvr.parallel.context import document_multiple, padded_lengths
from megatron_asvr.parallel.costs import rates

EXCHANGES = 8  # at most, for each rank: more of them gain nothing that could be measured
WORTH_IT = 0.01  # of the gap between two ranks: what an exchange has to close of it

Dealt = list[list[list[int]]]  # items of every micro-batch of every rank


class RowFacts(NamedTuple):
    """What the plan knows of one row: its positions and the images that it shows."""

    length: int
    images: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The items of a step.

    Attributes:
        items: rows of each, as (place of the sample in the global batch, number of its row).
        costs: modelled operations of each.
        lengths: positions of each with the padding of its documents.
        images: that the encoder gets for all of them.
    """

    items: list[list[tuple[int, int]]]
    costs: list[float]
    lengths: list[int]
    images: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Imbalance:
    """Largest load of a rank over the mean, of some steps together; 1 is perfect.

    Attributes:
        by_count: items dealt in order, as many to each rank.
        by_cost: items dealt by their modelled operations.
    """

    by_count: float
    by_cost: float

    def describe(self, dp: int) -> str:
        """One line for a log."""
        return (
            f"work of {dp} data-parallel ranks, max/mean of modelled operations: "
            f"{self.by_count:.3f} dealt by count, {self.by_cost:.3f} as dealt"
        )


class Planner:
    """Plans of the steps of a run.

    Args:
        config: the run.
        codebook_sizes: codes of every depth; empty without a visual head.
    """

    def __init__(self, config: Config, codebook_sizes: Sequence[int]) -> None:
        degrees = config.parallel
        self._rates = rates(config, codebook_sizes)
        self._packing, self._seed = config.data.packing, config.run.seed
        self._pad = document_multiple(tp=degrees.tp, cp=degrees.cp, sp=degrees.sp)
        limit = config.data.pack_length or config.data.max_length
        self.capacity = padded_lengths([limit], self._pad)[0]
        self._even = config.loss.mode != "official"
        self._size = config.train.micro_batch
        self._multiple = degrees.pp if degrees.vpp else 1

    def plan(self, samples: Sequence[Sequence[RowFacts]]) -> Plan:
        """The items of a global batch.

        Args:
            samples: rows of every sample, in order.

        Raises:
            DataError: a row is longer than a packed sequence.
        """
        rows = [(place, row) for place, own in enumerate(samples) for row in range(len(own))]
        facts = [samples[place][row] for place, row in rows]
        costs = [self._rates.document(row.length, row.images) for row in facts]
        lengths = padded_lengths([row.length for row in facts], self._pad)
        if self._packing:
            chosen = pack(lengths, self.capacity, self._seed)
        else:
            ends = itertools.accumulate(map(len, samples), initial=0)
            chosen = [list(range(a, b)) for a, b in itertools.pairwise(ends) if b > a]
        return Plan(
            items=[[rows[i] for i in item] for item in chosen],
            costs=[sum(costs[i] for i in item) for item in chosen],
            lengths=[sum(lengths[i] for i in item) for item in chosen],
            images=sum(row.images for row in facts),
        )

    def deal(self, plan: Plan, dp: int) -> Dealt:
        """Items of every micro-batch of every rank."""
        return self._deal(plan, dp, even=self._even)

    def imbalance(self, plans: Sequence[Plan], dp: int) -> Imbalance:
        """How even the ranks' work is over some steps, before and after dealing by cost."""
        found = []
        for even in (False, self._even):
            loads = [
                [sum(plan.costs[i] for group in rank for i in group) for rank in dealt]
                for plan in plans
                for dealt in [self._deal(plan, dp, even=even)]
            ]
            mean = sum(map(sum, loads)) / dp
            found.append(sum(map(max, loads)) / mean if mean else 1.0)
        return Imbalance(by_count=found[0], by_cost=found[1])

    def _deal(self, plan: Plan, dp: int, *, even: bool) -> Dealt:
        count = num_micro_batches(len(plan.costs), dp, self._size, multiple=self._multiple)
        if not even:
            parts = deal_by_count(len(plan.costs), dp)
        else:
            parts = deal_by_cost(plan.costs, dp, capacity=count * self._size)
            # The most expensive first: items of a micro-batch are padded to the same length, and
            # ranks that wait for one another in every micro-batch have similar ones.
            parts = [sorted(part, key=lambda i: (-plan.costs[i], i)) for part in parts]
        return [
            [sorted(part[k * self._size : (k + 1) * self._size]) for k in range(count)]
            for part in parts
        ]


def num_micro_batches(num_items: int, dp: int, size: int, *, multiple: int = 1) -> int:
    """Micro-batches of a step, the same on every data-parallel rank; at least one.

    Args:
        num_items: samples or packed sequences of the global batch.
        dp: ranks that share them.
        size: items of one micro-batch.
        multiple: what the number must be a multiple of.
    """
    largest_part = -(-num_items // dp)
    count = max(1, -(-largest_part // size))
    return -(-count // multiple) * multiple


def deal_by_count(num_items: int, dp: int) -> list[list[int]]:
    """Items of every rank: contiguous parts of equal size."""
    return [list(range(num_items * r // dp, num_items * (r + 1) // dp)) for r in range(dp)]


def deal_by_cost(costs: Sequence[float], dp: int, *, capacity: int) -> list[list[int]]:
    """Items of every rank, so that the most loaded one has little more than the others.

    The most expensive item goes first, each to the rank with least so far that has room. Then the
    most loaded rank exchanges items with others for as long as that makes it lighter.

    Args:
        costs: of every item.
        dp: number of ranks.
        capacity: most items of a rank.
    """
    parts: list[list[int]] = [[] for _ in range(dp)]
    loads = [0.0] * dp
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(dp) if len(parts[r]) < capacity), key=lambda r: (loads[r], r))
        parts[rank].append(item)
        loads[rank] += costs[item]
    for _ in range(EXCHANGES * dp):
        highest = max(range(dp), key=lambda r: (loads[r], -r))
        others = sorted((r for r in range(dp) if r != highest), key=lambda r: (loads[r], r))
        if not any(_exchange(costs, parts, loads, highest, other, capacity) for other in others):
            break
    return parts


def _exchange(
    costs: Sequence[float],
    parts: list[list[int]],
    loads: list[float],
    high: int,
    low: int,
    capacity: int,
) -> bool:
    """Whether an exchange of two items, or a move of one, brought two loads closer together."""
    gap = loads[high] - loads[low]
    given = np.array([costs[i] for i in parts[high]])
    back = np.array([costs[i] for i in parts[low]] + [0.0] * (len(parts[low]) < capacity))
    if not len(given) or not len(back):
        return False
    moved = given[:, None] - back[None]
    off = np.abs(moved - gap / 2)
    i, j = divmod(int(off.argmin()), len(back))
    if off[i, j] > (0.5 - WORTH_IT) * gap:  # nothing moves, or nearly as much too far
        return False
    item = parts[high].pop(i)
    if j < len(parts[low]):
        parts[high].append(parts[low].pop(j))
    parts[low].append(item)
    for rank in (high, low):
        loads[rank] = sum(costs[k] for k in parts[rank])
    return True
