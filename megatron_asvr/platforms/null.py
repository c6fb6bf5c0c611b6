"""Streams and events of a device on which every operator has finished when it returns."""

import torch


class NullEvent:
    """A point in a stream that has always been reached."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Accepts the settings of a CUDA event."""

    def record(self, stream: object = None) -> None:
        """Nothing to record."""

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always reached."""
        return True

    def elapsed_time(self, end: object) -> float:
        """No time passes on a stream that queues nothing."""
        return 0.0


class NullStream:
    """A queue that is always empty; also a context, as ``torch.cuda.stream`` returns one."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Accepts the settings of a CUDA stream."""
        self.device = torch.device("cpu")

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def record_event(self, event: NullEvent | None = None) -> NullEvent:
        """An event that has been reached."""
        return event or NullEvent()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always empty."""
        return True

    def __enter__(self) -> "NullStream":
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Nothing to restore."""

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """One priority."""
        return 0, 0
