"""The forward and backward passes of a step: what they give, and how long a stage was at them.

megatron-core's schedules start and stop a timer around every pass of a stage. Between them a stage
of a pipeline waits for others, and moves what it sends and gets.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_asvr.platforms import mcore, select  # noqa: F401  (mcore prepares the process)

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_asvr.batch import MicroBatch
from megatron_asvr.model.loss import LossSums, scales_of
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.precision.products import into_buffers
from megatron_asvr.precision.routing import balanced

Chunks = Sequence[DistributedDataParallel]  # this rank's stage, or its virtual stages
LossFunction = Callable[[LossSums], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one micro-batch contributed, detached.

    Attributes:
        totals: ``LossSums.totals``.
        loss: its part of the step's loss, fp32 scalar.
        codes_MD: int64 target codes, None without a visual head.
    """

    totals: Tensor
    loss: Tensor
    codes_MD: Tensor | None


class PassClock:
    """Adds up how long a stage's own passes took; a megatron-core configuration's ``timers``.

    On a GPU the time is the device's: what the host does in the meantime says nothing about it.
    """

    _PASSES = ("forward-compute", "backward-compute")

    def __init__(self) -> None:
        self._counts = False
        self._marks: list[Any] = []

    def __call__(self, name: str, log_level: int | None = None) -> "PassClock":
        """The timer of this name."""
        self._counts = name in self._PASSES
        return self

    def start(self, barrier: bool = False) -> None:
        """Something begins."""
        if self._counts:
            self._marks.append(select()[0].mark())

    stop = start

    def seconds(self) -> float:
        """Of all passes, when the device has done them."""
        between = select()[0].seconds
        return sum(map(between, self._marks[::2], self._marks[1::2]))


@contextlib.contextmanager
def clocked(chunks: Chunks) -> Iterator[PassClock]:
    """Inside, the passes of these chunks are timed.

    Args:
        chunks: the wrapped model.
    """
    config, clock = get_model_config(chunks[0]), PassClock()
    config.timers = clock
    try:
        yield clock
    finally:
        config.timers = None


def backward(chunks: Chunks, batches: Sequence[MicroBatch], loss: LossFunction) -> list[Part]:
    """What every micro-batch contributed, after adding gradients to the buffers.

    Empty on a pipeline stage that computes no loss.

    Args:
        chunks: the wrapped model.
        batches: this rank's micro-batches.
        loss: from sums to the scalar that is differentiated.
    """
    return run_schedule(chunks, batches, loss, forward_only=False)


def run_schedule(
    chunks: Sequence[nn.Module],
    batches: Sequence[MicroBatch],
    loss: LossFunction,
    *,
    forward_only: bool,
) -> list[Part]:
    """``backward``, or with ``forward_only`` the same passes without gradients."""
    before_last: list[Part] = []
    # megatron-core must see every gradient come when it sums them in the meantime.
    adds_at_once = not forward_only and not chunks[0].ddp_config.overlap_grad_reduce

    def finish(sums: LossSums) -> tuple[Tensor, Tensor, Part]:
        # A triple (loss, number of tokens, report). With calculate_per_token_loss the schedule
        # divides by nothing (schedules.py, forward_step_calc_loss), and the number is unused.
        value = loss(sums)
        part = Part(totals=sums.totals(), loss=value.detach(), codes_MD=sums.codes_MD)
        return value, torch.zeros((), dtype=torch.int), part

    def forward(iterator: Iterator[MicroBatch], chunk: nn.Module) -> tuple[Any, Callable[..., Any]]:
        batch = next(iterator)
        # Known before the sums, so that gradients of output layers need not wait for them.
        scales = None
        if adds_at_once:
            scales = scales_of(
                loss,
                text_count=batch.num_text_targets,
                visual_count=batch.num_visual_targets,
                visual_scale=batch.visual_scale,
                depth=chunks[0].module.num_depths,
            )
        output = chunk(to_device(batch), scales=scales)
        if isinstance(output, tuple):
            # A loss before the last stage rides on what is sent on: its gradient is 1 there, as a
            # mixture's load-balancing loss has it (precision/routing.py).
            hidden_SBH, sums = output
            value, _, part = finish(sums)
            before_last.append(part)
            output = MoEAuxLossAutoScaler.apply(hidden_SBH, value)
        return output, finish

    rows, length = batches[0].document_BS.shape
    with into_buffers() if adds_at_once else contextlib.nullcontext():
        return before_last + get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(batches) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(batches),
            # Stages send one another [S, B, H] of these sizes, less what cp and sp split.
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )


def balancing(
    chunks: Chunks, batches: Sequence[MicroBatch], loss: LossFunction, *, groups: Groups
) -> contextlib.AbstractContextManager[None]:
    """Inside, ``backward`` of these micro-batches includes the experts' load-balancing loss.

    The arguments are those of ``backward``.
    """
    return balanced(
        chunks,
        lambda: run_schedule(chunks, batches, loss, forward_only=True),
        group=groups.tp_cp_dp,
    )


def to_device(batch: MicroBatch) -> MicroBatch:
    """The batch with all its tensors on this rank's device; the host does not wait for them."""
    platform, _ = select()
    moved = copy.copy(batch)
    for field in dataclasses.fields(batch):
        if isinstance(x := getattr(batch, field.name), Tensor):
            setattr(moved, field.name, platform.bring(x))
    moved.document_lengths_Bn = batch.host_lengths()
    return moved
