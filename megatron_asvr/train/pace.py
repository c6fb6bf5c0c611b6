"""Which ranks are slower than the others, by the time that a step takes them by themselves.

That is waiting for data, and from the start of the forward passes to the end of the backward ones,
between two sums over the world. There the ranks of one replica of the model (tp, pp, cp) wait for
one another, so they are slow together, each by its node's name; replicas do not wait for others.
"""

import logging
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

from megatron_asvr.platforms import select

import torch

from megatron_asvr.parallel.collectives import gather_equal
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.train.metrics import MetricsLog

STEPS = 32  # whose median counts
LEAST = 16  # before which nothing is said
NAMED = 8  # ranks in one line

logger = logging.getLogger(__name__)


class Pace:
    """Compares how long the last steps took the ranks; all of them take part.

    Args:
        share: how much more than the median of all is slow; 0 compares nothing.
        hosts: of all ranks.
        groups: process groups of the layout.
    """

    def __init__(self, share: float, hosts: Sequence[str], *, groups: Groups) -> None:
        self._share, self._hosts, self._groups = share, hosts, groups
        self._own: deque[float] = deque(maxlen=STEPS)

    def add(self, own_s: float) -> None:
        """Note what one more step took this rank."""
        self._own.append(own_s)

    def report(self, log: MetricsLog, step: int) -> None:
        """Name the ranks that are slow, if there are any.

        Args:
            log: gets the slowest of them.
            step: steps done.
        """
        if not self._share or len(self._own) < LEAST or self._groups.world.size() == 1:
            return
        mine = torch.tensor(statistics.median(self._own), device=select()[0].device)
        medians = torch.stack(gather_equal(mine[None], group=self._groups.world)).flatten().tolist()
        usual, found = slow_ranks(medians, self._share)
        if not found or self._groups.rank:
            return
        logger.warning("%s", self._told(usual, found))
        worst = next(iter(found))
        facts = {"rank": worst, "host": self._hosts[worst], "own_s": found[worst], "usual_s": usual}
        log.write(step, "slow", facts)

    def _told(self, usual: float, found: Mapping[int, float]) -> str:
        named = [
            f"rank {rank} on {self._hosts[rank]} {own_s:.3f} s ({own_s / usual - 1:.0%} more)"
            for rank, own_s in list(found.items())[:NAMED]
        ]
        more = f" and {len(found) - NAMED} more ranks" if len(found) > NAMED else ""
        return (
            f"slow: of its own, the usual rank takes {usual:.3f} s a step, "
            f"{', '.join(named)}{more} (median of {len(self._own)} steps)"
        )


def slow_ranks(medians: Sequence[float], share: float) -> tuple[float, dict[int, float]]:
    """What a step takes the usual rank, and the slow ones, the slowest first.

    Args:
        medians: of all ranks.
        share: how much more than the usual is slow.
    """
    usual = statistics.median_low(medians)
    ranks = sorted(range(len(medians)), key=lambda rank: -medians[rank])
    return usual, {r: medians[r] for r in ranks if medians[r] > (1 + share) * usual}
