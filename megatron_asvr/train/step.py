"""One optimizer step: exact counts first, then gradients, then AdamW.

A loss is a sum divided by the number of its targets in the whole global batch. That number is
known from the data, so it is summed over the world before the first backward pass, and every
micro-batch's loss is already its exact part of the global one. Nothing is rescaled afterwards:
gradients are summed over ranks and micro-batches, never averaged.

What a step counts is brought by the stage that computes a loss, one rank of each tensor-parallel
group; all others bring zeros to the same sums over the world. So every rank knows every number,
and decides the same.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_asvr.platforms import mcore, select  # noqa: F401  (mcore prepares the process)

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_asvr.batch import MicroBatch
from megatron_asvr.config.schema import LossConfig
from megatron_asvr.errors import AsvrError
from megatron_asvr.model.loss import joint_loss, official_loss
from megatron_asvr.parallel.collectives import all_reduce_sum, gather_objects, sum_in_place
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.train.passes import Chunks, LossFunction, Part, backward, balancing, clocked


class AnomalyError(AsvrError):
    """The numbers of a step cannot be right; no weight was changed by it. Raised on every rank.

    Args:
        message: what is wrong, with samples.
        kind: ``nonfinite``, or ``spike`` of the loss.
    """

    def __init__(self, message: str, kind: str = "nonfinite") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """What all ranks must know before a step.

    Attributes:
        text_count: text targets of the global batch.
        visual_count: positions with a visual target, in the global batch.
        num_tokens: positions of the global batch, without padding.
        digest: of the samples of the global batch and their order (MicroBatch.digest, summed).
        stop: some rank was asked to stop after this step.
        recounted: sums of ``CacheCheck.counts`` (train/recheck.py).
        work: sums of ``Work.counts`` (train/work.py).
    """

    text_count: int
    visual_count: int
    num_tokens: int
    digest: int
    stop: bool
    recounted: tuple[int, ...] = ()
    work: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one step did, the same on every rank (seconds and ``parts``: of this rank).

    Attributes:
        totals: fp64 sum of ``LossSums.totals`` over the global batch.
        loss: the joint loss of the global batch.
        grad_norm: before clipping.
        own_s: seconds from the start to the end of the last backward pass; see pace.py.
        busy_s: seconds of these in which a forward or backward pass ran.
        wait_s: seconds that it then waited for the passes of others.
        parts: this rank's micro-batches; none on a stage that computes no loss.
    """

    totals: Tensor
    loss: float
    grad_norm: float
    own_s: float
    busy_s: float
    wait_s: float
    parts: list[Part]


def contributes(groups: Groups) -> bool:
    """Whether this rank's numbers count in sums over the world; see the module's docstring."""
    return (groups.has_text_loss or groups.is_last_stage) and groups.tp_rank == 0


def agree(
    batches: Sequence[MicroBatch],
    *,
    stop: bool,
    groups: Groups,
    recounted: Sequence[int] = (),
    work: Sequence[int] = (),
) -> Agreement:
    """Counts of the whole global batch and the joint decision to stop: one small all-reduce.

    Args:
        batches: this rank's micro-batches of the step.
        stop: this rank was asked to stop.
        groups: process groups of the layout.
        recounted: numbers of every rank to be summed too, as many on each.
        work: likewise.
    """
    counts = [0, 0, 0, 0]
    if contributes(groups):
        counts = [
            sum(b.num_text_targets for b in batches),
            sum(b.num_visual_targets for b in batches),
            groups.is_last_stage * sum(int((b.own(b.document_BS) >= 0).sum()) for b in batches),
            (groups.is_last_stage and groups.cp_rank == 0) * sum(b.digest for b in batches),
        ]
    mine = torch.tensor([*counts, int(stop), *recounted, *work], device=select()[0].device)
    values = all_reduce_sum(mine, group=groups.world)
    text_count, visual_count, num_tokens, digest, stops, *sums = values.tolist()
    return Agreement(
        text_count=text_count,
        visual_count=visual_count,
        num_tokens=num_tokens,
        digest=digest,
        stop=stops > 0,
        recounted=tuple(sums[: len(recounted)]),
        work=tuple(sums[len(recounted) :]),
    )


def loss_function(
    config: LossConfig, agreement: Agreement, *, num_micro_batches: int
) -> LossFunction:
    """The function from one micro-batch's sums to its part of the loss.

    Args:
        config: mode and weight.
        agreement: counts of the global batch.
        num_micro_batches: ``official`` averages over them, as the official trainer does.
    """
    if config.mode == "official":
        return lambda sums: (
            official_loss(sums, visual_weight=config.visual_weight) / num_micro_batches
        )
    return lambda sums: joint_loss(
        sums,
        global_text_count=agreement.text_count,
        global_visual_count=agreement.visual_count,
        visual_weight=config.visual_weight,
    )


def reduce_gradients(chunks: Chunks, *, groups: Groups, whole: bool = False) -> None:
    """Sum the gradient buffers over the ranks that hold other parts of them.

    megatron-core sums over data- and context-parallel ranks, tied embeddings over the first and
    last stage, and over the tensor-parallel ranks what each of them has of a norm. The encoder's
    are summed here, because each tensor-parallel rank encodes other images.

    Args:
        chunks: the wrapped model.
        groups: process groups of the layout.
        whole: every rank gets all of the sum, also where its optimizer needs only a share.
    """
    # megatron-core looks for a tied weight in the first chunk of a stage in the middle; a middle
    # stage with an LM head has it in its last one.
    middle_head = groups.has_text_loss and not (groups.is_first_stage or groups.is_last_stage)
    ordered = list(reversed(chunks)) if middle_head else list(chunks)
    finalize_model_grads(ordered, None, force_all_reduce=whole)
    partial = [p for chunk in chunks for p in chunk.module.partial_grad_parameters()]
    sum_in_place([p.main_grad for p in partial], group=groups.tp)


def train_step(
    chunks: Chunks,
    optimizer: MegatronOptimizer,
    batches: Sequence[MicroBatch],
    loss: LossFunction,
    *,
    step: int,
    groups: Groups,
    limit: float = math.inf,
) -> StepResult:
    """Losses and gradient norm of one step, after updating the weights.

    Args:
        chunks: the wrapped model.
        optimizer: of its parameters.
        batches: this rank's micro-batches.
        loss: see ``loss_function``.
        step: number of the step, for messages.
        groups: process groups of the layout.
        limit: a loss above it is a spike.

    Raises:
        AnomalyError: a loss or a gradient is not finite, or the loss is a spike.
    """
    started = time.perf_counter()
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    watched = [x for chunk in chunks if (x := chunk.module.watched) is not None]
    with contextlib.ExitStack() as stack:
        for linears in watched:
            stack.enter_context(linears.recording())
        clock = stack.enter_context(clocked(chunks))
        stack.enter_context(balancing(chunks, batches, loss, groups=groups))
        parts = backward(chunks, batches, loss)
    select()[0].synchronize()  # the sum that follows waits for the device in any case
    own_s = time.perf_counter() - started
    totals, value = sum_parts(parts, depth=chunks[0].module.num_depths, groups=groups)
    wait_s = time.perf_counter() - started - own_s
    if not (math.isfinite(value) and bool(totals.isfinite().all())):
        raise AnomalyError(_blame(parts, batches, step, groups))
    if value > limit:
        raise AnomalyError(
            f"step {step}: the loss {value:.4f} is a spike (limit {limit:.4f})", "spike"
        )
    reduce_gradients(chunks, groups=groups)
    norm = _update(optimizer, batches, step, groups)
    for linears in watched:
        linears.update()
    return StepResult(
        totals=totals,
        loss=value,
        grad_norm=norm,
        own_s=own_s,
        busy_s=clock.seconds(),
        wait_s=wait_s,
        parts=parts,
    )


def _update(
    optimizer: MegatronOptimizer, batches: Sequence[MicroBatch], step: int, groups: Groups
) -> float:
    """The gradient norm, after updating the weights if it is finite."""

    def check(grad_norm: float) -> None:
        if not math.isfinite(grad_norm):
            ids = [name for batch in batches for name in batch.sample_ids]
            raise AnomalyError(
                f"step {step}, rank {groups.rank}: the losses are finite but the gradient norm is "
                f"{grad_norm}; this rank's samples: {', '.join(ids)}. Lower train.optim.lr or set "
                "train.optim.clip_grad, and start again from the last checkpoint"
            )

    with checked_norm(optimizer, check):
        updated, norm, _ = optimizer.step()
    assert updated, "no gradient scaler is configured that could leave out an update"
    return float(norm or 0.0)


@contextlib.contextmanager
def checked_norm(optimizer: MegatronOptimizer, check: Callable[[float], None]) -> Iterator[None]:
    """Inside, ``optimizer.step`` hands the gradient norm to ``check`` before it changes a weight.

    megatron-core asks for the norm after the gradients are ready, clips by it and then updates.

    Args:
        optimizer: of ``get_megatron_optimizer``.
        check: what it raises leaves the weights and the optimizer's state as they were.
    """
    norm_of = optimizer.get_grad_norm

    def checked() -> float | None:
        norm = norm_of()
        check(float(norm or 0.0))
        return norm

    optimizer.get_grad_norm = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        del optimizer.get_grad_norm


def sum_parts(parts: Sequence[Part], *, depth: int, groups: Groups) -> tuple[Tensor, float]:
    """Totals (fp64, on the CPU) and loss of all ranks' parts, on every rank.

    Args:
        parts: of this rank.
        depth: number of depths of the visual head, 0 without one.
        groups: process groups of the layout.
    """
    mine = torch.zeros(4 + 2 * depth + 1, dtype=torch.float64, device=select()[0].device)
    for part in parts if contributes(groups) else ():
        mine += torch.cat([part.totals, part.loss.double()[None]])
    summed = all_reduce_sum(mine, group=groups.world).cpu()
    return summed[:-1], float(summed[-1])


def _blame(
    parts: Sequence[Part],
    batches: Sequence[MicroBatch],
    step: int,
    groups: Groups,
) -> str:
    """Which ranks and samples made a loss non-finite; every rank arrives here."""
    mine = [
        f"rank {groups.rank}: loss {float(part.loss)} from samples {', '.join(batch.sample_ids)}"
        for part, batch in (zip(parts, batches, strict=True) if contributes(groups) else ())
        if not (part.loss.isfinite() and part.totals.isfinite().all())
    ]
    found = "; ".join(line for lines in gather_objects(mine, group=groups.world) for line in lines)
    return (
        f"step {step}: the loss is not finite ({found}). Look at these samples, or lower "
        "train.optim.lr; the run can start again from its last checkpoint"
    )
