"""The process that local ranks are born from: ``python -m megatron_asvr.launch.nursery``.

It imports torch, megatron-core and our modules once; on the CPU each rank is then a fork, which
costs milliseconds and shares that memory. It has one thread and never computes, so forking is safe.
On a GPU, where a fork would inherit CUDA's state, each rank is an interpreter of its own.

The launcher talks to it over two pipes, one JSON value a line: jobs and signals in, reports out.
When the launcher goes, its end of the pipe closes and the nursery ends; when the nursery ends, so
do its ranks (a request to the kernel, so that holds for SIGKILL too).
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import select
import signal
import sys
import time
import weakref
from typing import Any

from megatron_asvr.platforms.replacements import die_with_parent

from megatron_asvr.launch.worker import Job, leave, preload, run_rank

GRACE_S = 1.0  # for the other ranks to write their own tracebacks after the first has failed
PRELOAD = (
    "megatron_asvr.parallel.groups",
    "megatron_asvr.parallel.collectives",
    "megatron_asvr.launch.job",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.distributed",
    "megatron.core.pipeline_parallel",
)


class Nursery:
    """Starts the ranks of one job after the other, and reports how each of them ended."""

    def __init__(self, commands: int, reports: int) -> None:
        self._commands = commands  # file descriptors
        self._reports = reports
        self._unread = b""
        self._pids: dict[int, int] = {}  # rank of each process that runs
        self._child_ended, wake = os.pipe()
        os.set_blocking(self._child_ended, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self._end())
        die_with_parent(signal.SIGTERM)

    def serve(self) -> None:
        """Run jobs until the launcher closes its pipe."""
        while (command := self._next_command()) is not None:
            if isinstance(command, dict):
                self._run(Job(**command))

    def _next_command(self) -> Any:
        """What the launcher sent, or None when it has closed its pipe."""
        while b"\n" not in self._unread:
            data = os.read(self._commands, 1 << 16)
            if not data:
                return None
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return json.loads(line)

    def _run(self, job: Job) -> None:
        if job.fork:
            for entry in reversed(job.path):
                if entry not in sys.path:
                    sys.path.insert(0, entry)
            preload((*PRELOAD, job.module))
            gc.freeze()  # else the ranks' garbage collectors touch, so copy, all of this memory
        for rank in range(job.world_size):
            self._pids[self._start(job, rank)] = rank
        deadline: float | None = None
        stopping = False
        while self._pids:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._child_ended, self._commands], [], [], left)
            if self._child_ended in ready:
                os.read(self._child_ended, 4096)
            if self._commands in ready:
                self._obey()
            failed = self._reap(stopping)
            if failed and deadline is None:
                deadline = time.monotonic() + GRACE_S
            if deadline is not None and time.monotonic() >= deadline:
                _kill_groups(list(self._pids))
                stopping = True
                deadline = time.monotonic() + GRACE_S
        self._report(done=True)

    def _end(self) -> None:
        """The launcher has gone: leave nothing behind."""
        _kill_groups(list(self._pids))
        os._exit(0)

    def _obey(self) -> None:
        """Pass on the signal that the launcher asks for; end everything when it has gone."""
        while True:
            command = self._next_command()
            if command is None:
                self._end()
            for pid in self._pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, command)  # to the ranks only, not to their helpers
            if b"\n" not in self._unread:
                return

    def _reap(self, stopping: bool) -> bool:
        """Report the ranks that have ended; whether one of them failed.

        A rank that failed takes along the processes it has started, such as checkpoint writers.
        """
        failed = False
        for pid in list(self._pids):
            status = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if status is None:
                continue
            time_ns = time.time_ns()
            code = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
            if code != 0:
                _kill_groups([pid])  # before its number is free for another process
                failed = True
            os.waitpid(pid, 0)
            self._report(rank=self._pids.pop(pid), code=code, time_ns=time_ns, stopped=stopping)
        return failed

    def _start(self, job: Job, rank: int) -> int:
        """Process id of a new rank."""
        if not job.fork:
            return _spawn(job, rank)
        sys.stdout.flush()
        # Until a rank has left our handler behind, it must not act on a signal that is passed on.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        pid = os.fork()
        if pid == 0:
            self._become_rank(job, rank)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return pid

    def _become_rank(self, job: Job, rank: int) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        for descriptor in (self._commands, self._reports, self._child_ended):
            os.close(descriptor)
        for finalizer in list(weakref.finalize._registry):
            finalizer.atexit = False  # ours: temporary folders, and torch's operators (40 ms)
        _settle()
        leave(run_rank(job, rank))

    def _report(self, **fields: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._reports, json.dumps(fields).encode() + b"\n")


def _settle() -> None:
    """A rank has its own process group (a signal reaches its helpers too) and dies with us."""
    os.setpgid(0, 0)
    parent = os.getppid()
    die_with_parent()
    if os.getppid() != parent or parent == 1:
        os._exit(1)


def _spawn(job: Job, rank: int) -> int:
    path = pathlib.Path(job.folder, "job")
    if not path.exists():
        path.write_text(json.dumps(dataclasses.asdict(job)))
    command = [sys.executable, "-m", __spec__.name, "--job", str(path), "--rank", str(rank)]
    env = {**job.env, "PYTHONPATH": os.pathsep.join(entry or job.cwd for entry in job.path)}
    return os.posix_spawn(sys.executable, command, env)


def _kill_groups(pids: list[int]) -> None:
    """Kill ranks together with the processes they have started."""
    for pid in pids:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:  # too early: the rank has no group of its own yet
            os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Serve a launcher, or be one rank of a job whose ranks are not forked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--commands", type=int)
    parser.add_argument("--reports", type=int)
    parser.add_argument("--job")
    parser.add_argument("--rank", type=int)
    args = parser.parse_args()
    if args.job is not None:
        _settle()
        leave(run_rank(Job(**json.loads(pathlib.Path(args.job).read_text())), args.rank))
    Nursery(args.commands, args.reports).serve()


if __name__ == "__main__":
    main()
