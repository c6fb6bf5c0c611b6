"""Which documents share a sequence: a pure function of their lengths and the seed."""

from collections.abc import Sequence

import numpy as np

from megatron_asvr.errors import DataError


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Documents, by their index, of every sequence: the better of two methods.

    First-fit decreasing needs at most 11/9 of the fewest possible sequences (and one more). Where
    it needs more than the lengths add up to, sequences are also filled one at a time, each with the
    longest document left and whatever fills it best; of the two the plan with fewer sequences
    counts (`benchmarks/packing.py` compares both with a lower bound). Documents of one sequence are
    in order, sequences are in the order of their first documents; every document is in one.

    Args:
        lengths: positions of each document, padding included.
        capacity: positions of a sequence.
        seed: decides between documents of equal length.

    Raises:
        DataError: a document is longer than a sequence.

    Source: Gupta and Ho, A new heuristic algorithm for the one-dimensional bin-packing problem,
    1999 (minimum bin slack).
    """
    longest = max(lengths, default=0)
    if longest > capacity:
        raise DataError(
            f"document {list(lengths).index(longest)} has {longest} positions with its padding, "
            f"a packed sequence {capacity}; raise data.pack_length or lower data.max_length"
        )
    # Philox and whole numbers only: the same plan on every platform.
    key = np.array([seed % 2**64, 0], dtype=np.uint64)
    shuffled = np.random.Generator(np.random.Philox(key=key)).permutation(len(lengths)).tolist()
    longest_first = sorted(shuffled, key=lambda i: -lengths[i])
    packs = first_fit(lengths, capacity, longest_first)
    if len(packs) > -(-sum(lengths) // capacity):
        packs = min(packs, best_fill(lengths, capacity, longest_first), key=len)
    return sorted(sorted(indices) for indices in packs)


def first_fit(lengths: Sequence[int], capacity: int, order: Sequence[int]) -> list[list[int]]:
    """Each document of ``order`` in the first sequence that has room."""
    room = np.full(len(lengths), capacity, dtype=np.int64)  # of every sequence there could be
    packs: list[list[int]] = [[] for _ in lengths]
    for index in order:
        first = int(np.argmax(room >= lengths[index]))
        room[first] -= lengths[index]
        packs[first].append(index)
    return [indices for indices in packs if indices]


def best_fill(lengths: Sequence[int], capacity: int, order: Sequence[int]) -> list[list[int]]:
    """Sequences filled one after another: the first document left, and what fills the rest best."""
    left = list(order)
    packs = []
    while left:
        rest = capacity - lengths[left[0]]
        chosen = [0, *_fullest([lengths[i] for i in left[1:]], rest)]
        packs.append([left[place] for place in chosen])
        for place in reversed(chosen):
            del left[place]
    return packs


def _fullest(lengths: Sequence[int], capacity: int) -> list[int]:
    """Places, plus one and ascending, of the lengths whose sum comes closest to ``capacity``.

    Bit n of a number says that some of the lengths so far add up to n.
    """
    fitting = [(place, n) for place, n in enumerate(lengths, 1) if n <= capacity]
    within, sums = (1 << (capacity + 1)) - 1, [1]
    for _, n in fitting:
        sums.append((sums[-1] | sums[-1] << n) & within)
        if sums[-1] >> capacity:
            break
    total, chosen = sums[-1].bit_length() - 1, []
    for number in range(len(sums) - 1, 0, -1):
        if not sums[number - 1] >> total & 1:  # not without this one
            place, n = fitting[number - 1]
            chosen.append(place)
            total -= n
    return chosen[::-1]
