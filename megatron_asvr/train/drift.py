"""A guard over products in 8 bits: each linear is compared with itself in full precision.

Every so many steps the step's first micro-batch is computed twice more, changing nothing: once in 8
bits, for its loss, and once in ``train.precision``, where every linear also computes its output and
both gradients in 8 bits from the same operands. Where the least cosine of the three falls below a
threshold, over all ranks and positions, the linear stays in ``train.precision`` from then on.
"""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_asvr.batch import MicroBatch
from megatron_asvr.checkpoint.meta import ResumeState
from megatron_asvr.config.schema import Fp8Config
from megatron_asvr.parallel.collectives import gather_objects
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.precision.fp8.drift import Drift, cosines, shares
from megatron_asvr.train.metrics import MetricsLog
from megatron_asvr.train.passes import Chunks, LossFunction, run_schedule
from megatron_asvr.train.start import Run
from megatron_asvr.train.step import sum_parts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the guard saw, the same on every rank.

    Attributes:
        values: losses of both passes, the least cosine of all and, by linear, cosines and shares of
            values that became 0 or were clamped.
        moved: linears that leave 8 bits now.
    """

    values: Mapping[str, float | str | None]
    moved: tuple[str, ...]


def check_drift(
    run: Run,
    batches: Sequence[MicroBatch],
    loss: LossFunction,
    log: MetricsLog,
    done: ResumeState,
) -> ResumeState:
    """``done`` with the linears that leave 8 bits after the step that was just made.

    All ranks take part. Nothing happens where nothing is in 8 bits.

    Args:
        run: the run.
        batches: this rank's micro-batches of the step.
        loss: of the step.
        log: where the verdict goes.
        done: where the run stood before the step.
    """
    fp8, step = run.config.precision.fp8, done.step + 1
    if fp8.recipe == "none":
        return done
    verdict = judge(run.wrapped, batches, loss, fp8, groups=run.groups)
    log.write(step, "fp8", verdict.values)
    left = {**done.left_fp8, **dict.fromkeys(verdict.moved, step)}
    return replace(done, left_fp8=left)


def judge(
    chunks: Chunks,
    batches: Sequence[MicroBatch],
    loss: LossFunction,
    settings: Fp8Config,
    *,
    groups: Groups,
) -> Verdict:
    """The verdict over this moment; linears that fall below the threshold are turned off.

    All ranks take part. The gradient buffers are overwritten: the next step clears them.

    Args:
        chunks: the wrapped model, with its products.
        batches: this rank's micro-batches of a step.
        loss: of that step.
        settings: the threshold.
        groups: process groups of the layout.
    """
    watched = [chunk.module.watched for chunk in chunks]
    some = batches[: groups.plan.pp if groups.plan.vpp else 1]  # what virtual stages take at least
    depth = chunks[0].module.num_depths
    with torch.no_grad():
        rounded = run_schedule(chunks, some, loss, forward_only=True)
    _, in_8_bits = sum_parts(rounded, depth=depth, groups=groups)

    for chunk in chunks:
        chunk.zero_grad_buffer()
    with contextlib.ExitStack() as stack:
        drifts = [stack.enter_context(linears.compared()) for linears in watched]
        exact = run_schedule(chunks, some, loss, forward_only=False)
    _, in_full = sum_parts(exact, depth=depth, groups=groups)

    rows = {name: _row(drift) for share in drifts for name, drift in share.items()}
    shared = gather_objects(rows, group=groups.world)
    rows = {name: row for share in shared for name, row in share.items()}
    least = {name: row["cosine"] for name, row in rows.items() if row["cosine"] is not None}
    moved = sorted(name for name, cosine in least.items() if cosine < settings.guard_min_cosine)
    for linears in watched:
        linears.turn_off(moved)
    if groups.rank == 0:
        for name in moved:
            logger.warning(
                "%s leaves 8 bits: its results agree with exact ones by a cosine of %.4f, less "
                "than precision.fp8.guard_min_cosine=%s",
                name,
                least[name],
                settings.guard_min_cosine,
            )
    values = {f"{name}.{key}": value for name, row in rows.items() for key, value in row.items()}
    summary = {
        "loss_fp8": in_8_bits,
        "loss_exact": in_full,
        "least_cosine": min(least.values(), default=None),
        "moved": ", ".join(moved),
    }
    return Verdict({**summary, **values}, tuple(moved))


def _row(drift: Drift) -> dict[str, float | None]:
    """Numbers of one linear."""
    found = cosines(drift.products)
    names = ("output_cosine", "input_gradient_cosine", "weight_gradient_cosine")
    known = [cosine for cosine in found if cosine is not None]
    return {
        "cosine": min(known, default=None),
        **dict(zip(names, found, strict=True)),
        **shares(drift.values),
    }
