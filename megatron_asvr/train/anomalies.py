"""Steps whose numbers cannot be right: not trained on, and their samples left out of the run.

A step is judged before it changes a weight, by numbers that are the same on every rank, so all
decide alike. A batch that is left out is a gap in the order of the batches: the step is taken with
the next one, and so is every later step. What is left out is recorded in the run folder before the
run goes on, and in every later checkpoint. So the run is, to the bit, one whose order never had
these batches, however often it is interrupted.
"""

import dataclasses
import json
import logging
import math
import statistics
from collections.abc import Sequence

from megatron_asvr.checkpoint.meta import ResumeState
from megatron_asvr.config.schema import AnomalyConfig
from megatron_asvr.data.order import batch_of
from megatron_asvr.errors import AsvrError
from megatron_asvr.parallel.collectives import on_first
from megatron_asvr.train.saving import Saver
from megatron_asvr.train.start import Run
from megatron_asvr.train.step import AnomalyError

NORMAL = 1.4826  # standard deviations of a normal distribution in a median absolute deviation
LEAST = 0.01  # of the median: a deviation that any loss has

logger = logging.getLogger(__name__)


class RollBack(Exception):  # noqa: N818  (nothing is wrong any more)
    """The run goes on from its newest checkpoint; raised on every rank."""


class Guard:
    """What a run does about steps whose numbers cannot be right.

    Args:
        run: the run.
        saver: writes its checkpoints.
    """

    def __init__(self, run: Run, saver: Saver) -> None:
        self._run, self._saver, self._settings = run, saver, run.config.train.anomaly

    def limit(self, done: ResumeState) -> float:
        """Loss above which the next step is a spike."""
        return spike_limit(done.losses, self._settings)

    def note(self, done: ResumeState, loss: float) -> ResumeState:
        """Where the run stands, with one more loss to compare the next ones with."""
        if self._settings.on_spike == "ignore":
            return done
        return dataclasses.replace(
            done, losses=[*done.losses, loss][-self._settings.spike_window :]
        )

    def react(self, anomaly: AnomalyError, done: ResumeState) -> ResumeState:
        """Where the run stands, when it leaves out a batch; all ranks take part.

        Args:
            anomaly: what is wrong with the next step.
            done: where it stands before.

        Raises:
            AnomalyError: that same one, if it is to stop the run.
            AsvrError: there were too many of them.
            RollBack: the run is to go on from its newest checkpoint.
        """
        policy = getattr(self._settings, f"on_{anomaly.kind}")
        if policy == "stop":
            raise anomaly
        self._saver.finish(done.step)
        first = done.step
        if policy == "rollback":
            first = min(first, self._newest_checkpoint())
        steps = range(first, done.step + 1)
        batches = sorted({batch_of(step, done.skipped) for step in steps})
        self._record(anomaly, policy, done.step, batches)
        if self._run.groups.rank == 0:
            action = "skipped" if policy == "skip" else f"rolled back to step {first}"
            logger.warning("%s; %s, without batches %s", anomaly, action, batches)
        if policy == "rollback":
            raise RollBack
        return dataclasses.replace(done, skipped=sorted({*done.skipped, *batches}))

    def _newest_checkpoint(self) -> int:
        latest = self._run.folder.latest
        return on_first(lambda: latest() or 0, group=self._run.groups.world)

    def _record(
        self, anomaly: AnomalyError, policy: str, step: int, batches: Sequence[int]
    ) -> None:
        folder, data = self._run.folder, self._run.data.train
        event = {
            "step": step,
            "why": str(anomaly),
            "policy": policy,
            "batches": list(batches),
            "samples": [name for batch in batches for name in data.sample_ids(batch)],
        }

        def write() -> None:
            before = folder.events()
            if len(before) >= self._settings.max_events:
                raise AsvrError(
                    f"{anomaly}. {len(before)} earlier steps were left out ({folder.skipped}), and "
                    f"train.anomaly.max_events={self._settings.max_events} are allowed; look for "
                    "the cause, or allow more"
                )
            lines = [json.dumps(known) + "\n" for known in [*before, event]]
            with folder.being_written(), folder.written(folder.skipped, self._run.attempt) as path:
                path.write_text("".join(lines), encoding="utf-8")

        on_first(write, group=self._run.groups.world)


def spike_limit(losses: Sequence[float], settings: AnomalyConfig) -> float:
    """Loss above which a step is a spike; infinite before enough are known.

    Args:
        losses: of the last steps.
        settings: how many deviations from the median are too many.
    """
    if settings.on_spike == "ignore" or len(losses) < settings.spike_window:
        return math.inf
    middle = statistics.median(losses)
    spread = NORMAL * statistics.median(abs(loss - middle) for loss in losses)
    return middle + settings.spike_mads * max(spread, LEAST * abs(middle))
