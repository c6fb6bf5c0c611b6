"""What one local rank does: set up, call the function, leave its result or its traceback behind."""

import atexit
import faulthandler
import importlib
import json
import os
import pathlib
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch.distributed as dist

from megatron_asvr.errors import AsvrError
from megatron_asvr.launch.rank import init_group, leave_group, prepare_rank

FAILED = 1  # exit status of a rank whose function raised
LOG_START = "=== "  # begins the line that opens each call's part of a rank's log


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One call of ``run_ranks``, as the ranks see it.

    Attributes:
        folder: private folder of this call: function and arguments, results, tracebacks, store.
        world_size: number of ranks.
        module: the module that defines the function.
        path: ``sys.path`` of the caller.
        cwd: working directory of the caller.
        env: environment of the caller.
        log_dir: folder of ``rank_R.log``, or None to write to the caller's terminal.
        threads: CPU threads per rank.
        deterministic: whether the switches of ``platforms.deterministic`` are set.
        init: whether the default process group is initialised before the call.
        timeout_s: how long a collective may wait for the other ranks.
        fork: ranks are forked from the nursery; otherwise each is a new interpreter.
    """

    folder: str
    world_size: int
    module: str
    path: list[str]
    cwd: str
    env: dict[str, str]
    log_dir: str | None
    threads: int
    deterministic: bool
    init: bool
    timeout_s: float
    fork: bool


class Tee:
    """A text stream that writes to two: the rank's log and the terminal."""

    def __init__(self, log: TextIO, terminal: TextIO) -> None:
        self._log = log
        self._terminal = terminal

    def write(self, text: str) -> int:
        """Write to both; a terminal that is gone does not stop the run."""
        self._log.write(text)
        self._log.flush()
        try:
            self._terminal.write(text)
            self._terminal.flush()
        except OSError:
            self._terminal = self._log
        return len(text)

    def flush(self) -> None:
        """Everything is written at once already."""

    def isatty(self) -> bool:
        """Whether a person looks at the second stream."""
        return self._terminal.isatty()

    def fileno(self) -> int:
        """Descriptor of the log, for libraries that write below Python."""
        return self._log.fileno()

    @property
    def encoding(self) -> str:
        """Encoding of the log."""
        return self._log.encoding


def run_rank(job: Job, rank: int) -> int:
    """Exit status of one rank, after everything it had to do.

    The result of rank 0 is in ``result`` of the job's folder, a traceback in ``TIME.rank_R``.
    """
    try:
        _enter(job, rank)
        result = _call(job, rank)
        if rank == 0:
            _write(pathlib.Path(job.folder, "result"), pickle.dumps(result))
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            return 0
        text = traceback.format_exc()
        if isinstance(error, AsvrError):
            own = {"kind": type(error).__name__, "message": _with_notes(error)}
            _write(pathlib.Path(job.folder, f"own_error_{rank}"), json.dumps(own).encode())
        _write(pathlib.Path(job.folder, f"{time.time_ns()}.rank_{rank}"), text.encode())
        if job.log_dir is not None:
            sys.stderr.write(text)  # without a log, the launcher shows it
        return FAILED
    return 0


def _with_notes(error: BaseException) -> str:
    """An error's message with what was added to it on its way up."""
    return "; ".join([str(error), *getattr(error, "__notes__", [])])


def leave(status: int) -> None:
    """End this process; exit handlers run, the interpreter's teardown (it can crash) does not."""
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _write(path: pathlib.Path, data: bytes) -> None:
    part = path.with_name(f"part-{path.name}")
    part.write_bytes(data)
    part.rename(path)


def _enter(job: Job, rank: int) -> None:
    """Environment, output and exit behaviour of a rank."""
    # Ctrl-C ends a rank without a word, wherever it stands; training asks to be told instead.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for name in os.environ.keys() - job.env.keys() - {"PYTHONPATH"}:
        del os.environ[name]  # the nursery may be older than the caller's environment
    os.environ.update(job.env)
    os.environ.update(rank_env(rank, job.world_size))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
    os.chdir(job.cwd)
    if job.log_dir is not None:
        terminal = os.fdopen(os.dup(1), "w")
        path = pathlib.Path(job.log_dir, f"rank_{rank}.log")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(1, f"{LOG_START}rank {rank} of {job.world_size}, {started}\n".encode())
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        if rank == 0:
            sys.stdout = Tee(sys.stdout, terminal)
    faulthandler.enable(sys.__stderr__)


def rank_env(rank: int, world_size: int) -> dict[str, str]:
    """The variables by which torch's launchers tell a rank its place."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


def _call(job: Job, rank: int) -> Any:
    prepare_rank(rank, job.threads, deterministic=job.deterministic)
    with open(pathlib.Path(job.folder, "call"), "rb") as file:
        fn, args = pickle.load(file)
    if not job.init:
        return fn(*args)
    store = dist.FileStore(f"{job.folder}/store", job.world_size)
    init_group(rank, job.world_size, store=store, timeout_s=job.timeout_s)
    result = fn(*args)
    leave_group()
    return result


def preload(modules: Sequence[str]) -> None:
    """Import what every rank will need; a module that fails here fails in the ranks, visibly."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception:
            continue
