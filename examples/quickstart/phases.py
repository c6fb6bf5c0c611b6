"""Phases that survive being interrupted: done once, measured, and done again when they change.

A phase's marker holds the hash of everything the phase depends on, the markers before it included.
A phase whose marker fits and says so is done; any other starts without its old outputs, except that
a killed training with the same settings continues in its own folder.
"""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from examples.quickstart.data import write_atomically

SAMPLE_S = 1.0
NOTHING_USED = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_mem_bytes": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One step of the quick start.

    Attributes:
        name: also the name of its marker.
        run: does the work.
        inputs: settings and file contents that the result depends on.
        outputs: what is removed before the phase starts afresh.
        continues: whether ``run`` goes on where an interrupted call with the same inputs stopped.
    """

    name: str
    run: Callable[[], None]
    inputs: Sequence[str] = ()
    outputs: Sequence[Path] = ()
    continues: bool = False


@dataclass(slots=True)
class Phases:
    """Runs phases in order.

    Attributes:
        folder: of the markers.
        say: prints a line.
        results: marker of every phase that is done, by name.
    """

    folder: Path
    say: Callable[[str], None]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    _chain: str = ""

    def do(self, phase: Phase) -> None:
        """Run one phase unless its marker says that it is done."""
        text = "\0".join([self._chain, phase.name, *phase.inputs])
        self._chain = hashlib.sha256(text.encode()).hexdigest()
        done = self.folder / f"{phase.name}.json"
        marker = {**NOTHING_USED, **_read(done)}
        if marker.get("hash") == self._chain and marker.get("done"):
            self.results[phase.name] = marker
            self.say(f"{phase.name}: done before, in {marker['seconds']:.0f} s")
            return
        same = marker.get("hash") == self._chain
        if not same:
            marker = {"hash": self._chain, "done": False, **NOTHING_USED}
        if not (same and phase.continues):
            for path in phase.outputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.say(f"{phase.name}: starts")
        with Meter(done, marker) as meter:
            phase.run()
        marker["done"] = True
        meter.write()
        self.results[phase.name] = marker
        peak = marker["peak_mem_bytes"] / 2**30
        self.say(
            f"{phase.name}: {marker['seconds']:.0f} s ({marker['cpu_seconds']:.0f} CPU-s), "
            f"peak memory {peak:.2f} GiB"
        )


class Meter:
    """Adds wall and CPU seconds and peak memory of this process and all below it to a marker.

    Memory is the proportional set size, so pages that ranks share are counted once. CPU time is
    sampled: what a process used after its last sample is missed. The marker is written every
    second, so what was used before an interruption is not forgotten.

    Args:
        path: of the marker.
        marker: with what earlier calls used (``NOTHING_USED`` before the first).
    """

    def __init__(self, path: Path, marker: dict[str, Any]) -> None:
        self._path, self._marker = path, marker
        self._before = dict(marker)
        self._cpu_s: dict[int, float] = {}  # by process, as last seen
        self._earlier_cpu_s: dict[int, float] = {}  # what processes that were there had used
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Meter":
        self._started = time.monotonic()
        self._look()
        self._earlier_cpu_s = dict(self._cpu_s)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.write()

    def write(self) -> None:
        """Bring the marker on disk up to date."""
        write_atomically(self._path, json.dumps(self._marker))

    def _sample(self) -> None:
        while True:
            self._look()
            self.write()
            if self._stop.wait(SAMPLE_S):
                self._look()
                return

    def _look(self) -> None:
        """Bring the marker up to date."""
        here = psutil.Process()
        used_bytes = 0
        for process in (here, *here.children(recursive=True)):
            try:
                used_bytes += process.memory_full_info().pss
                times = process.cpu_times()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            self._cpu_s[process.pid] = times.user + times.system
        cpu_s = sum(self._cpu_s.values()) - sum(self._earlier_cpu_s.values())
        self._marker["cpu_seconds"] = self._before["cpu_seconds"] + cpu_s
        self._marker["seconds"] = self._before["seconds"] + time.monotonic() - self._started
        self._marker["peak_mem_bytes"] = max(self._marker["peak_mem_bytes"], used_bytes)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
