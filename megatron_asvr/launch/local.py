"""Run one function in several ranks on this machine, and say clearly which of them failed.

The ranks are children of a *nursery* (see ``nursery.py``), which this process starts once and
keeps: the first call pays for importing torch and megatron-core, later ones start in a fraction of
a second. Ranks meet through a file, so jobs that run at the same time never race for a port.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import pathlib
import pickle
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from megatron_asvr.platforms import select

from megatron_asvr import errors
from megatron_asvr.errors import AsvrError, LaunchError
from megatron_asvr.launch.rank import DEFAULT_TIMEOUT_S
from megatron_asvr.launch.worker import LOG_START, Job

LOG_TAIL_LINES = 20
CLOSE_S = 2.0  # for the nursery to notice that its launcher has gone
ABORT_S = 2.0  # for ranks that ran out of time to write where they stand
# The sockets of a killed process close before its end is reported: peers may complain earlier.
SIGNAL_HEAD_START_NS = 200_000_000
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def run_ranks(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    world_size: int = 1,
    *,
    log_dir: str | os.PathLike[str] | None = None,
    timeout_s: float | None = None,
    threads_per_rank: int = 1,
    deterministic: bool = False,
    init: bool = True,
) -> Any:
    """What ``fn(*args)`` returns on rank 0, after all ranks have finished.

    When one rank fails, the others get a second to write their own tracebacks and are killed. All
    ranks die with this process. SIGTERM, SIGUSR1 and a first SIGINT (Ctrl-C) sent to this process
    reach the ranks; a second SIGINT ends them at once.

    Args:
        fn: a function that can be pickled, defined at the top of an importable module.
        args: its arguments, the same for every rank; they must be picklable.
        world_size: number of ranks.
        log_dir: folder for ``rank_R.log`` with each rank's output (created; appended to); what
            rank 0 writes to ``sys.stdout`` also appears on the terminal. None: all on the terminal.
        timeout_s: limit of the whole call, and of each collective in it. None: no limit of the
            call, 10 minutes for a collective.
        threads_per_rank: CPU threads of each rank.
        deterministic: set the switches of ``platforms.deterministic`` in each rank.
        init: initialise the default process group before the call, destroy it afterwards.

    Raises:
        LaunchError: a rank raised, died or ran out of time; the earliest failure comes first. When
            that was an error of ours, it is the cause (``__cause__``).
    """
    if fn.__module__ == "__main__":
        raise LaunchError(
            f"{fn.__qualname__} is defined in the script that was started, which ranks cannot "
            "import; move it to a module"
        )
    if log_dir is not None:
        pathlib.Path(log_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="asvr-") as folder:
        pathlib.Path(folder, "call").write_bytes(pickle.dumps((fn, tuple(args))))
        job = Job(
            folder=folder,
            world_size=world_size,
            module=fn.__module__,
            path=sys.path,
            cwd=os.getcwd(),
            env=dict(os.environ),
            log_dir=None if log_dir is None else os.path.abspath(log_dir),
            threads=threads_per_rank,
            deterministic=deterministic,
            init=init,
            timeout_s=timeout_s or DEFAULT_TIMEOUT_S,
            fork=select()[0].supports_fork,
        )
        outcome = _run_job(job, timeout_s)
        if sum(code == 0 for code, _ in outcome.ended.values()) < world_size:
            if outcome.interrupted:
                raise KeyboardInterrupt
            failures = _failures(job, outcome)
            text = _explain(job, outcome, failures, timeout_s)
            raise LaunchError(text) from _own_error(job, failures)
        result = pathlib.Path(folder, "result")
        return pickle.loads(result.read_bytes()) if result.exists() else None


@dataclasses.dataclass(slots=True)
class _Outcome:
    """How the ranks ended.

    Attributes:
        ended: exit code (negative: a signal's number) and time in ns of each that ended by itself.
        stopped: ranks that had to be killed.
        late: the call ran out of time.
        interrupted: this process got SIGINT meanwhile.
    """

    ended: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
    stopped: list[int] = dataclasses.field(default_factory=list)
    late: bool = False
    interrupted: bool = False


class _Nursery:
    """The launcher's end of the nursery process."""

    def __init__(self) -> None:
        commands, self._commands = os.pipe()
        self._reports, reports = os.pipe()
        command = [sys.executable, "-m", "megatron_asvr.launch.nursery"]
        command += ["--commands", str(commands), "--reports", str(reports)]
        single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **single, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            pass_fds=(commands, reports),
            start_new_session=True,
        )
        os.close(commands)
        os.close(reports)
        self._unread = b""

    def send(self, value: object) -> None:
        """Send a job or the number of a signal."""
        with contextlib.suppress(BrokenPipeError):
            data = json.dumps(value).encode() + b"\n"
            while data:
                data = data[os.write(self._commands, data) :]

    def reports(self, deadline: float | None) -> Iterator[dict[str, Any] | None]:
        """Each report until the job is done; None when the deadline passed or the nursery died."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._reports, selectors.EVENT_READ)
            while True:
                while b"\n" not in self._unread:
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    data = selector.select(left) and os.read(self._reports, 1 << 16)
                    if not data:
                        yield None
                        return
                    self._unread += data
                line, _, self._unread = self._unread.partition(b"\n")
                report = json.loads(line)
                if "done" in report:
                    return
                yield report

    def close(self) -> None:
        """End the process and everything it started."""
        os.close(self._commands)  # it kills what still runs, and ends
        os.close(self._reports)
        try:
            self.process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:  # it is importing
            self.process.kill()
            self.process.wait()


_nursery: _Nursery | None = None
_nursery_key: tuple[int, str | None] | None = None
_lock = threading.Lock()


def _get_nursery() -> _Nursery:
    """The nursery of this process; a new one if there is none or it died."""
    global _nursery, _nursery_key
    key = (os.getpid(), os.environ.get("ASVR_PLATFORM"))
    if _nursery is not None and _nursery_key == key and _nursery.process.poll() is None:
        return _nursery
    _close_nursery()
    _nursery, _nursery_key = _Nursery(), key
    return _nursery


@atexit.register
def _close_nursery() -> None:
    global _nursery
    if _nursery is not None and _nursery_key is not None and _nursery_key[0] == os.getpid():
        _nursery.close()
    _nursery = None


def _run_job(job: Job, timeout_s: float | None) -> _Outcome:
    """Let the nursery run the job and collect how its ranks ended."""
    outcome = _Outcome()
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with _lock:
        nursery = _get_nursery()
        try:
            with _forward_signals(nursery, outcome):
                nursery.send(dataclasses.asdict(job))
                finished = _collect(nursery, outcome, deadline)
                if not finished and nursery.process.poll() is None:
                    outcome.late = True
                    nursery.send(int(signal.SIGABRT))  # faulthandler writes where each rank stands
                    finished = _collect(nursery, outcome, time.monotonic() + ABORT_S)
        except BaseException:
            _close_nursery()
            raise
        if not finished:
            _close_nursery()
    if outcome.late:
        outcome.stopped = [rank for rank in range(job.world_size) if rank not in outcome.ended]
    outcome.stopped.sort()
    return outcome


def _collect(nursery: _Nursery, outcome: _Outcome, deadline: float | None) -> bool:
    """Whether all ranks ended before the deadline; how they did is added to the outcome."""
    for report in nursery.reports(deadline):
        if report is None:
            return False
        if report["stopped"] or outcome.late:
            outcome.stopped.append(report["rank"])
        else:
            outcome.ended[report["rank"]] = (report["code"], report["time_ns"])
    return True


@contextlib.contextmanager
def _forward_signals(nursery: _Nursery, outcome: _Outcome) -> Iterator[None]:
    """Pass signals on to the ranks while they run (from the main thread only).

    A terminal's Ctrl-C does not reach the ranks by itself: the nursery has its own session.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: FrameType | None) -> None:
        nursery.send(number)
        if number == signal.SIGINT:
            outcome.interrupted = True
            signal.signal(number, before[number])  # the next one ends this process

    before = {number: signal.getsignal(number) for number in _FORWARDED}
    for number in _FORWARDED:
        signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _failures(job: Job, outcome: _Outcome) -> dict[int, str]:
    """What each rank that failed by itself says, the earliest failure first."""
    found: dict[int, tuple[int, str]] = {}
    for path in pathlib.Path(job.folder).glob("*.rank_*"):
        rank = int(path.name.rpartition("_")[2])
        found[rank] = (int(path.name.partition(".")[0]), path.read_text(errors="replace"))
    for rank, (code, time_ns) in outcome.ended.items():
        if code != 0 and rank not in found:
            text = f"{_cause(code)}\n{_log_tail(job, rank)}"
            # Nothing that another rank does kills one, so a kill is never what came second.
            first = 0 if code == -signal.SIGKILL else time_ns - SIGNAL_HEAD_START_NS
            found[rank] = (first, text)
    return {rank: found[rank][1] for rank in sorted(found, key=lambda rank: found[rank][0])}


def _own_error(job: Job, failures: dict[int, str]) -> AsvrError | None:
    """The error of ours that the earliest failure was, if it was one."""
    path = pathlib.Path(job.folder, f"own_error_{next(iter(failures), None)}")
    if not path.exists():
        return None
    own = json.loads(path.read_text())
    return getattr(errors, own["kind"], AsvrError)(own["message"])


def _explain(job: Job, outcome: _Outcome, failures: dict[int, str], timeout_s: float | None) -> str:
    """Which ranks failed and why."""
    parts = [f"rank {rank}: {text}" for rank, text in failures.items()]
    if outcome.late:
        late = [f"rank {rank}: {_log_tail(job, rank)}" for rank in outcome.stopped]
        parts += [f"ranks {outcome.stopped} had not finished after {timeout_s:g} s", *late]
    elif outcome.stopped:
        parts.append(f"ranks {outcome.stopped} were stopped because of that")
    if not parts:
        parts.append("the process that starts the ranks died; was it killed for memory?")
    head = f"{len(failures)} of {job.world_size} ranks failed"
    return "\n".join([f"{head}, the earliest first:" if len(failures) > 1 else f"{head}:", *parts])


def _cause(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


def _log_tail(job: Job, rank: int) -> str:
    if job.log_dir is None:
        return ""
    path = pathlib.Path(job.log_dir, f"rank_{rank}.log")
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    starts = [i for i, line in enumerate(lines) if line.startswith(LOG_START)]
    lines = lines[starts[-1] :] if starts else lines
    return "\n".join([f"last lines of {path}:", *lines[-LOG_TAIL_LINES:]])
