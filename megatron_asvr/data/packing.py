"""Which documents share a sequence: a pure function of their lengths and the seed."""

from collections.abc import Sequence

import numpy as np

from megatron_asvr.errors import DataError


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Documents, by their index, of every sequence: first-fit decreasing.

    At most 11/9 of the fewest possible sequences (and one more). Documents of one sequence are in
    order, sequences are in the order of their first documents; every document is in one.

    Args:
        lengths: positions of each document, padding included.
        capacity: positions of a sequence.
        seed: decides between documents of equal length.

    Raises:
        DataError: a document is longer than a sequence.
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
    room = np.full(len(lengths), capacity, dtype=np.int64)  # of every sequence there could be
    packs: list[list[int]] = [[] for _ in lengths]
    for index in sorted(shuffled, key=lambda i: -lengths[i]):
        first = int(np.argmax(room >= lengths[index]))
        room[first] -= lengths[index]
        packs[first].append(index)
    return sorted(sorted(indices) for indices in packs if indices)
