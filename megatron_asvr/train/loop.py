"""One training stage, from top to bottom.

Everything that happens in a run is a visible call in ``train`` and ``run_steps``: what is read,
trained, logged, evaluated and saved, and when. Killed at any point, the same call continues it,
and the weights it ends with are the same bit for bit.
"""

import contextlib
import gc
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from typing import Any

from megatron_asvr.platforms import select

from megatron_asvr.batch import MicroBatch
from megatron_asvr.checkpoint.meta import ResumeState
from megatron_asvr.config.schema import Config
from megatron_asvr.data.order import batch_of
from megatron_asvr.log import clock, show_log
from megatron_asvr.parallel.collectives import gather_objects
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.train.anomalies import Guard, RollBack
from megatron_asvr.train.assemble import Data, make_groups, open_data
from megatron_asvr.train.drift import check_drift
from megatron_asvr.train.metrics import MetricsLog, Window, last_values, progress_line
from megatron_asvr.train.optim import learning_rate
from megatron_asvr.train.pace import Pace
from megatron_asvr.train.parity import check_parity
from megatron_asvr.train.recheck import CacheCheck
from megatron_asvr.train.saving import Saver
from megatron_asvr.train.signals import StopRequest
from megatron_asvr.train.start import Run, start
from megatron_asvr.train.step import Agreement, AnomalyError, agree, loss_function, train_step
from megatron_asvr.train.telemetry import CodeUsage, gradient_cosine
from megatron_asvr.train.validate import validate
from megatron_asvr.train.watchdog import Watchdog
from megatron_asvr.train.work import Work

logger = logging.getLogger(__name__)


def train(config: Config) -> dict[str, Any]:
    """What the run came to; call it on every rank. A run that was interrupted is continued.

    Args:
        config: the run.

    Returns:
        ``finished`` (false when a signal stopped it early), ``step``, the step it was
        ``continued_from``, damaged checkpoints that were skipped, the number of ``failed_saves``,
        the last logged ``train`` and ``eval`` values, totals, peak memory of every rank, and what
        was bad or replaced in the data of every data-parallel rank.

    Raises:
        ConfigError: a setting cannot work.
        DataError: the data cannot be used, or cached codes are not what this run computes.
        CheckpointError: the run's folder belongs to another run, a source of weights does not fit,
            the last checkpoint cannot be written, or a newer start of the run is at work.
        AsvrError: a loss or gradient is not finite, and ``train.anomaly`` does not allow for it.
    """
    begun_s = time.perf_counter()
    show_log("stdout")
    groups = make_groups(config)
    config = check_parity(config, groups=groups)
    with contextlib.closing(open_data(config, groups=groups)) as data:
        check = CacheCheck(config, data, groups=groups)
        while True:
            with contextlib.suppress(RollBack):
                return train_from_checkpoint(config, data, check, begun_s=begun_s, groups=groups)
            begun_s = time.perf_counter()
            gc.collect()  # the model that is given up


def train_from_checkpoint(
    config: Config, data: Data, check: CacheCheck, *, begun_s: float, groups: Groups
) -> dict[str, Any]:
    """What ``train`` returns, of one start.

    Raises:
        RollBack: samples are left out from now on, and the newest checkpoint is to be continued.
    """
    run = start(config, data, begun_s=begun_s, groups=groups)
    attempt = run.folder.attempt(run.attempt)
    with (
        StopRequest() as stop,
        MetricsLog(
            run.folder,
            config,
            done_steps=run.done.step,
            attempt=run.attempt,
            active=groups.rank == 0,
        ) as log,
        Watchdog(config.train.watchdog, attempt, groups=groups) as watchdog,
    ):
        log.write(run.done.step, "start", times(run, run.done))
        saver = Saver(run, log)
        done = run_steps(run, saver, log, stop, check, watchdog)
    return {**summary(run, done), "failed_saves": saver.failures}


def run_steps(
    run: Run,
    saver: Saver,
    log: MetricsLog,
    stop: StopRequest,
    check: CacheCheck,
    watchdog: Watchdog,
) -> ResumeState:
    """Where the run stands after its last step, or after the step in which it was told to stop.

    Args:
        run: the run.
        saver: writes its checkpoints.
        log: where metrics go.
        stop: tells when this rank was asked to stop.
        check: computes some of what is cached again.
        watchdog: ends a run that hangs in a step.
    """
    config, groups, data, settings = run.config, run.groups, run.data, run.config.train
    done, window, usage = run.done, Window(**run.done.window), CodeUsage(data.codebook_sizes)
    joined = run.chunks[0].images.joined
    guard, work = Guard(run, saver), Work(config, data.tokenizer, joined=joined, groups=groups)
    pace = Pace(settings.watchdog.slow_share, watchdog.hosts, groups=groups)
    while done.step < run.total_steps:
        step, batch = done.step, batch_of(done.step, done.skipped)
        started = time.perf_counter()
        with watchdog.step(step):
            batches = data.train.step(batch)
            data_s = time.perf_counter() - started

            with naming(step, batches, groups):
                told = stop.reason is not None or run.is_superseded
                recounted = check.counts(step, batches, run.chunks[0].images)
                sums = {"recounted": recounted, "work": work.counts(batches)}
                agreement = agree(batches, stop=told, groups=groups, **sums)
                if due(step, settings.cosine_every_steps):
                    cosine = gradient_cosine(run.wrapped, batches, agreement, groups=groups)
                    log.write(step + 1, "cosine", {"gradient_cosine": cosine})
                rate = learning_rate(run.optimizer)
                loss = loss_function(config.loss, agreement, num_micro_batches=len(batches))
                try:
                    result = train_step(
                        run.wrapped,
                        run.optimizer,
                        batches,
                        loss,
                        step=step,
                        groups=groups,
                        limit=guard.limit(done),
                    )
                except AnomalyError as anomaly:
                    done = guard.react(anomaly, done)
                    continue
                run.schedule.step(1)
                usage.add(result.parts)
                if due(step + 1, config.precision.fp8.guard_every_steps):
                    done = check_drift(run, batches, loss, log, done)

        train_s = time.perf_counter() - started
        pace.add(data_s + result.own_s)
        window.add(result, agreement, data_s=data_s, train_s=train_s)
        done = advance(
            guard.note(done, result.loss),
            agreement,
            samples=settings.global_batch,
            bad_samples=data.train.num_bad([batch]),
            train_s=train_s,
            elapsed_s=run.elapsed_s,
        )
        last = done.step == run.total_steps

        if last or due(done.step, settings.log_every_steps):
            values = {**window.values(), "lr": rate, **usage.values(groups=groups)}
            write_line(run, log, done, {**values, **work.values(window), **times(run, done)})
            pace.report(log, done.step)
            check.judge(window.recount)
            window = Window()

        if data.held_out and (last or due(done.step, settings.eval_every_steps)):
            with window.pause("eval"):
                evaluate(run, log, done)

        with window.pause("save"):
            saver.after_step(replace(done, window=asdict(window)), last=last or agreement.stop)
        if agreement.stop:
            break
    return done


def write_line(run: Run, log: MetricsLog, done: ResumeState, values: dict[str, Any]) -> None:
    """Write the numbers of the steps since the last line, and tell the main ones."""
    values |= {"bad_samples": done.bad_samples, "skipped_batches": len(done.skipped)}
    log.write(done.step, "train", {**values, "data_hash": done.data_hash})
    tell(run.groups, progress_line(values, step=done.step, total_steps=run.total_steps))


def evaluate(run: Run, log: MetricsLog, done: ResumeState) -> None:
    """Write the losses on held-out data, and tell the main ones; all ranks take part."""
    held_out = validate(run.chunks, run.data.held_out, run.config.loss, groups=run.groups)
    log.write(done.step, "eval", held_out)
    tell(run.groups, f"eval at step {done.step}: {main_numbers(held_out)}")


def times(run: Run, done: ResumeState) -> dict[str, float]:
    """Seconds of the run, and the share of them that went into steps that count."""
    seconds = {"elapsed_s": run.elapsed_s, "lost_s": done.lost_s}
    return {**seconds, "goodput": done.train_s / seconds["elapsed_s"]}


def advance(
    done: ResumeState,
    agreement: Agreement,
    *,
    samples: int,
    bad_samples: int,
    train_s: float,
    elapsed_s: float,
) -> ResumeState:
    """Totals after one more step."""
    return replace(
        done,
        step=done.step + 1,
        samples=done.samples + samples,
        bad_samples=done.bad_samples + bad_samples,
        text_targets=done.text_targets + agreement.text_count,
        visual_targets=done.visual_targets + agreement.visual_count,
        tokens=done.tokens + agreement.num_tokens,
        data_hash=sha256(f"{done.data_hash} {agreement.digest}".encode()).hexdigest()[:16],
        train_s=done.train_s + train_s,
        elapsed_s=elapsed_s,
    )


def due(step: int, every_steps: int) -> bool:
    """Whether something that happens every so many steps happens at ``step``; 0 is never."""
    return every_steps > 0 and step % every_steps == 0


@contextlib.contextmanager
def naming(step: int, batches: Sequence[MicroBatch], groups: Groups) -> Iterator[None]:
    """Add rank, step and samples to whatever goes wrong inside."""
    try:
        yield
    except Exception as err:
        ids = [name for batch in batches for name in batch.sample_ids]
        err.add_note(f"rank {groups.rank}, step {step}, samples {', '.join(ids)}")
        raise


def tell(groups: Groups, line: str) -> None:
    """Log a line once, on rank 0."""
    if groups.rank == 0:
        logger.info(line)


def main_numbers(values: dict[str, float]) -> str:
    """The main numbers of an evaluation."""
    names = ("loss", "text_loss", "text_accuracy", "visual_loss", "visual_accuracy_0")
    return ", ".join(f"{name} {values[name]:.4f}" for name in names if name in values)


def summary(run: Run, done: ResumeState) -> dict[str, Any]:
    """What ``train`` returns; all ranks take part."""
    groups = run.groups
    is_model_rank_0 = groups.tp_rank == groups.pp_rank == groups.cp_rank == 0
    mine = {
        "peak_mem_bytes": select()[0].peak_memory_bytes(),
        "data": run.data.train.report() if is_model_rank_0 else None,
    }
    ranks = gather_objects(mine, group=groups.world)
    finished = done.step == run.total_steps
    state = "finished" if finished else "stopped"
    spent = times(run, done)
    tell(
        groups,
        f"{state} after {done.step} of {run.total_steps} steps, which took {clock(done.train_s)} "
        f"of {clock(spent['elapsed_s'])} (goodput {spent['goodput']:.0%})",
    )
    return {
        "run": str(run.folder.root),
        "finished": finished,
        "step": done.step,
        "total_steps": run.total_steps,
        "continued_from": run.done.step,
        "skipped_checkpoints": dict(run.skipped),
        "train": last_values(run.folder.metrics, "train"),
        "eval": last_values(run.folder.metrics, "eval"),
        "samples": done.samples,
        "bad_samples": done.bad_samples,
        "tokens": done.tokens,
        "train_s": done.train_s,
        **spent,
        "peak_mem_bytes": [rank["peak_mem_bytes"] for rank in ranks],
        "data": [rank["data"] for rank in ranks if rank["data"] is not None],
    }
