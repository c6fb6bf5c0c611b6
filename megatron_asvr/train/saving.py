"""When a run is saved, and what happens when that fails.

A save that fails does not stop the run: it is told, and tried again a step later, then two, four
and so on. Only the last one must succeed, since nothing comes after it.
"""

import logging
import time

from megatron_asvr.platforms import select

import torch

from megatron_asvr.checkpoint.meta import ResumeState
from megatron_asvr.checkpoint.save import Save, prune
from megatron_asvr.errors import AsvrError, CheckpointError
from megatron_asvr.parallel.collectives import all_reduce_sum
from megatron_asvr.train.metrics import MetricsLog
from megatron_asvr.train.start import Run

FINAL_WAITS_S = (1.0, 3.0, 9.0)  # between the tries of the last save

logger = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of a run; every rank has one, and calls it after every step.

    Args:
        run: the run.
        log: where failures are reported.

    Attributes:
        failures: saves of this start that failed.
    """

    def __init__(self, run: Run, log: MetricsLog) -> None:
        self.failures = 0
        self._run, self._log, self._settings = run, log, run.config.train
        self._under_way: Save | None = None
        self._in_a_row = 0
        self._retry_step: int | None = None

    def after_step(self, done: ResumeState, *, last: bool) -> None:
        """Save where the run stands, if it is time for that.

        Args:
            done: where it stands.
            last: the run ends here, so this save must succeed.

        Raises:
            CheckpointError: the last save failed again and again, or a newer start of the same run
                is at work.
            AsvrError: there are weights that are not finite.
        """
        if last:
            self._save_at_last(done)
            return
        step = done.step
        if self._under_way is not None and self._written_everywhere(self._under_way):
            self._publish(step)
        if step % self._settings.save_every_steps == 0 or step == self._retry_step:
            self._publish(step)
            self._under_way = self._begin(done, background=self._settings.async_save)
            if not self._settings.async_save:
                self._publish(step)

    def finish(self, step: int) -> None:
        """Bring a save that is under way to its end; all ranks take part.

        Args:
            step: where the run stands.
        """
        self._publish(step)

    def _begin(self, done: ResumeState, *, background: bool) -> Save:
        """The checkpoint of ``done``, of weights that a run can go on with."""
        weights = (p for chunk in self._run.chunks for p in chunk.parameters() if p.requires_grad)
        bad = torch.tensor(
            sum(not bool(x.isfinite().all()) for x in weights), device=select()[0].device
        )
        if int(all_reduce_sum(bad, group=self._run.groups.world)):
            raise AsvrError(
                f"step {done.step}: some weights are no longer finite, so they are not saved; the "
                "checkpoints before are untouched. Lower train.optim.lr, and start again from there"
            )
        return self._run.begin_save(done, background=background)

    def _save_at_last(self, done: ResumeState) -> None:
        self._publish(done.step)
        for wait_s in (*FINAL_WAITS_S, 0.0):
            self._under_way = self._begin(done, background=False)
            failure = self._publish(done.step)
            if failure is None:
                return
            time.sleep(wait_s)
        raise CheckpointError(
            f"{self._run.folder.step(done.step)} was not written: {failure}. The run ends here "
            f"without it, after {1 + len(FINAL_WAITS_S)} tries; its newest checkpoint before is "
            "untouched, and the same command continues from there"
        )

    def _publish(self, step: int) -> str | None:
        """Bring the save under way to its end, if there is one; why it failed."""
        save, self._under_way = self._under_way, None
        if save is None:
            return None
        failure = save.publish()
        is_first = self._run.groups.rank == 0
        if failure is None:
            self._in_a_row, self._retry_step = 0, None
            if is_first and not self._run.is_superseded:
                prune(
                    self._run.folder,
                    self._settings.keep_checkpoints,
                    self._settings.keep_every_steps,
                )
            return None
        self.failures += 1
        self._in_a_row += 1
        pause = min(2 ** (self._in_a_row - 1), self._settings.save_every_steps)
        self._retry_step = step + pause
        if is_first:
            logger.error(
                "the checkpoint of step %d was not written (failure %d in a row), the run goes on "
                "and tries again: %s",
                save.step,
                self._in_a_row,
                failure,
            )
        self._log.write(step, "save", {"failed_in_a_row": self._in_a_row})
        return failure

    def _written_everywhere(self, save: Save) -> bool:
        writing = torch.tensor(int(not save.is_written), device=select()[0].device)
        return int(all_reduce_sum(writing, group=self._run.groups.world)) == 0
