"""Which samples a step trains on: a pure function of (seed, step), whatever the world's size.

An epoch takes a number of samples from every source, its share of the blend, and shuffles them
together. A source that is not taken whole goes on where its last epoch ended, through permutations
of its own, so that none of its samples comes again before all the others have come. Everything is
keyed by the seed in a counter-based generator, and steps run through the concatenation of all
epochs. Nothing is stored: a resumed run, or one with another number of ranks, computes the same
lists.
"""

from collections.abc import Collection, Sequence
from functools import lru_cache

import numpy as np

from megatron_asvr.config.schema import SourceConfig


def blend(sources: Sequence[SourceConfig], sizes: Sequence[int]) -> list[int]:
    """Samples that an epoch takes from every source.

    With weights an epoch is as long as all sources together and divided by them; without, a source
    is taken ``epochs`` times. ``max_samples`` limits either. No source vanishes by rounding.

    Args:
        sources: their settings.
        sizes: samples of each.
    """
    weights = [source.weight if size else 0.0 for source, size in zip(sources, sizes, strict=True)]
    taken = []
    for source, size, weight in zip(sources, sizes, weights, strict=True):
        if weight is not None:
            share = sum(sizes) * weight / sum(w or 0.0 for w in weights) if weight else 0.0
        else:
            share = size * source.epochs
        number = max(1, round(share)) if size else 0
        taken.append(min(number, source.max_samples or number))
    return taken


def batch_of(step: int, skipped: Collection[int]) -> int:
    """The step of an order that a run's ``step`` trains on, when some of the order are left out.

    Args:
        step: of the run, counted from 0.
        skipped: those left out.
    """
    number = step
    for gap in sorted(skipped):
        number += gap <= number
    return number


class StepOrder:
    """Sample indices of every step.

    Args:
        sizes: samples of every source; sources follow one another in the indices.
        global_batch: samples of one step.
        seed: of the run.
        taken: samples that an epoch takes from every source; default: all of them.
        shuffle: false goes once through the samples that are taken, in file order (evaluation); the
            last step is then shorter instead of reaching into a second epoch.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        global_batch: int,
        *,
        seed: int,
        taken: Sequence[int] | None = None,
        shuffle: bool = True,
    ) -> None:
        self.sizes = list(sizes)
        self.taken = list(sizes if taken is None else taken)
        self.global_batch = global_batch
        self.seed = seed
        self.shuffle = shuffle
        self._first = np.cumsum([0, *self.sizes]).tolist()  # sample of every source
        self._slots = np.cumsum([0, *self.taken])  # of every source in an epoch

    @property
    def steps(self) -> int:
        """Steps of one epoch: enough of them to meet every sample of it."""
        return -(-sum(self.taken) // self.global_batch)

    def indices(self, step: int) -> list[int]:
        """Sample indices of one global batch, in order."""
        start, total = step * self.global_batch, sum(self.taken)
        places = range(start, start + self.global_batch)
        if not self.shuffle:
            return [self._sample(0, place) for place in places if place < total]
        chosen = []
        for place in places if total else ():
            epoch, offset = divmod(place, total)
            slot = int(_permutation(total, self.seed, epoch)[offset])
            chosen.append(self._sample(epoch, slot))
        return chosen

    def neighbours(self, index: int) -> range:
        """Indices of the source that a sample belongs to."""
        source = int(np.searchsorted(self._first, index, side="right")) - 1
        return range(self._first[source], self._first[source + 1])

    def _sample(self, epoch: int, slot: int) -> int:
        source = int(np.searchsorted(self._slots, slot, side="right")) - 1
        number, size = slot - int(self._slots[source]), self.sizes[source]
        if self.shuffle and self.taken[source] != size:
            turn, offset = divmod(epoch * self.taken[source] + number, size)
            number = int(_permutation(size, self.seed, turn, source + 1)[offset])
        return self._first[source] + number


@lru_cache(maxsize=16)
def _permutation(number: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    # 64-bit key words: the seed is taken modulo 2**64, so that negative seeds work too.
    key = np.array([seed % 2**64, stream * 2**40 + epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(number)
