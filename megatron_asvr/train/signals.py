"""A request to stop, from a scheduler or a person, kept until the step is over.

The handler only sets a flag. All ranks learn of it in the small all-reduce that opens every step
(train/step.py), so they finish the same step, save it and leave together.
"""

import signal
from types import FrameType
from typing import Any

# SIGUSR1 is what a batch script forwards before the time limit; SIGTERM is preemption.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """``with StopRequest() as stop:`` collects signals; a second Ctrl-C ends the process at once.

    Any other signal may come again: a preempted job gets SIGTERM from Slurm and SIGUSR1 from its
    script.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._previous[signal.SIGINT])

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
