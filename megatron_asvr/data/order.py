"""Which samples a step trains on: a pure function of (seed, step), whatever the world's size.

Every epoch is its own permutation, keyed by (seed, epoch) in a counter-based generator; steps run
through the concatenation of all epochs. Nothing is stored: a resumed run, or one with another
number of ranks, computes the same lists.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


class StepOrder:
    """Sample indices of every step.

    Args:
        num_samples: samples of the data set, at least 1.
        global_batch: samples of one step.
        seed: of the run.
        shuffle: false goes through the samples once in file order (evaluation); the last step
            is then shorter instead of reaching into a second epoch.
    """

    def __init__(
        self, num_samples: int, global_batch: int, *, seed: int, shuffle: bool = True
    ) -> None:
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.seed = seed
        self.shuffle = shuffle

    @property
    def steps(self) -> int:
        """Steps of one epoch: enough of them to meet every sample."""
        return -(-self.num_samples // self.global_batch)

    def indices(self, step: int) -> list[int]:
        """Sample indices of one global batch, in order."""
        start = step * self.global_batch
        stop = start + self.global_batch
        if not self.shuffle:
            return list(range(start, min(stop, self.num_samples)))
        chosen = []
        for place in range(start, stop):
            epoch, offset = divmod(place, self.num_samples)
            chosen.append(int(_permutation(self.num_samples, self.seed, epoch)[offset]))
        return chosen


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    # 64-bit key words: the seed is taken modulo 2**64, so that negative seeds work too.
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(num_samples)


def rank_part(items: Sequence[Item], dp_rank: int, dp: int) -> list[Item]:
    """The contiguous, balanced part of a global batch that one data-parallel rank computes."""
    count = len(items)
    return list(items[count * dp_rank // dp : count * (dp_rank + 1) // dp])


def num_micro_batches(num_items: int, dp: int, size: int, *, multiple: int = 1) -> int:
    """Micro-batches of a step, the same on every data-parallel rank; at least one.

    Args:
        num_items: samples or packed sequences of the global batch.
        dp: ranks that share them by ``rank_part``.
        size: items of one micro-batch.
        multiple: what the number must be a multiple of.
    """
    largest_part = -(-num_items // dp)
    count = max(1, -(-largest_part // size))
    return -(-count // multiple) * multiple


def micro_batches(items: Sequence[Item], size: int, count: int) -> list[list[Item]]:
    """``items`` in ``count`` groups of ``size``: the last ones are smaller, or empty."""
    return [list(items[place * size : (place + 1) * size]) for place in range(count)]
