"""Faults that are planted at a place: one rank skips a collective, stops, or cannot go on."""

import itertools
from collections.abc import Callable
from typing import Any

STEP = 5  # of the hang, counted from 0
HANG_S = 6.0  # longer than a step on a busy machine


def once(fn: Callable[..., Any], instead: Callable[[Any], Any]) -> Callable[..., Any]:
    """``fn``; but in the step of the hang ``instead``, which gets what ``fn`` returned last."""
    calls, last = itertools.count(), [None]

    def called(*args: Any, **kwargs: Any) -> Any:
        last[0] = instead(last[0]) if next(calls) == STEP else fn(*args, **kwargs)
        return last[0]

    return called


def skip_a_collective() -> None:
    """Make this process's run leave out the sum over the world that opens a step."""
    from megatron_asvr.train import loop

    loop.agree = once(loop.agree, lambda last: last)


def break_memory() -> None:
    """Make this process's first step end with what torch says of a GPU whose memory is broken."""
    from megatron_asvr.train import loop

    def train_step(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    loop.train_step = train_step
