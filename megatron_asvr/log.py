"""Log lines for people: where they go, and how far a long task is."""

import logging
import sys
import time

logger = logging.getLogger(__name__)

PROGRESS_S = 10.0


def show_log(stream: str) -> None:
    """Send this package's log lines to a standard stream, unless the caller has set them up.

    Args:
        stream: ``stdout``, or ``stderr`` where standard output is for results.
    """
    root = logging.getLogger("megatron_asvr")
    if not root.handlers and not logging.getLogger().handlers:
        root.addHandler(_Handler(stream))
        root.setLevel(logging.INFO)
        logging.getLogger("megatron.core").setLevel(logging.ERROR)  # advice about its own future


class _Handler(logging.Handler):
    """Plain lines to whatever the stream is at that moment: a rank's is replaced."""

    def __init__(self, stream: str) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            stream = getattr(sys, self._stream)
            stream.write(self.format(record) + "\n")
            stream.flush()
        except OSError:  # a log on a full disk does not stop a run
            self.handleError(record)


def clock(seconds: float) -> str:
    """``h:mm:ss`` of a duration."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


class Progress:
    """Logs how far a long task is, every ``PROGRESS_S`` seconds, with the time that is left.

    Args:
        what: name of the task.
        total: amount of work.
        unit: what is counted.
    """

    def __init__(self, what: str, total: int, *, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._before = self._done = 0
        self._start = self._last = time.monotonic()

    def skip(self, amount: int) -> None:
        """Count work that an earlier start has done."""
        self._before += amount
        self._done += amount

    def add(self, amount: int, note: str = "") -> None:
        """Count work that is done; ``note`` is added to the line."""
        self._done += amount
        now = time.monotonic()
        if now - self._last < PROGRESS_S:
            return
        self._last = now
        left_s = (now - self._start) / max(1, self._done - self._before)
        left_s *= self._total - self._done
        line = "%s: %d of %d %s, ETA %s%s"
        logger.info(
            line,
            self._what,
            self._done,
            self._total,
            self._unit,
            clock(left_s),
            note and f", {note}",
        )
