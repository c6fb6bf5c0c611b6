"""The run folder: one place that knows where everything of a run lies.

    config.yaml          the resolved configuration of the last start
    metrics.jsonl        one line per logged step or evaluation
    checkpoints/step_N/  complete checkpoints: the trained weights, optimizer and resume state
    frozen/              weights that are not trained, written once, named by their content
    attempts/K/          rank logs of the K-th start

A checkpoint appears under its final name by one rename, when all of it is on disk, so a folder
``step_N`` is complete by construction; anything unfinished carries another name.
"""

import json
import os
import re
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_asvr.errors import ConfigError

META = "meta.json"
_STEP = re.compile(r"step_(\d+)")
_PARTIAL = ".partial"
_CLAIM = "start.json"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run.

    Args:
        root: the folder, which need not exist yet.
    """

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Logged steps and evaluations, one JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.root / "checkpoints"

    @property
    def frozen(self) -> Path:
        """Folder of the weights that are not trained."""
        return self.root / "frozen"

    @property
    def attempts(self) -> Path:
        """Folder of the rank logs, one folder a start."""
        return self.root / "attempts"

    def step(self, step: int) -> Path:
        """Folder of the checkpoint of ``step``."""
        return self.checkpoints / f"step_{step}"

    def partial(self, step: int, attempt: int) -> Path:
        """Where attempt ``attempt`` writes the checkpoint of ``step`` before it is complete."""
        return self.checkpoints / f"{_PARTIAL}_step_{step}_attempt_{attempt}"

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        if not self.checkpoints.is_dir():
            return []
        found = ((_STEP.fullmatch(p.name), p) for p in self.checkpoints.iterdir())
        return sorted(int(m[1]) for m, p in found if m and (p / META).is_file())

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def next_attempt(self) -> Path:
        """A new folder ``attempts/K`` for the logs of a start, K counted from 0.

        Raises:
            ConfigError: it cannot be made.
        """
        number = self.last_attempt() + 1
        while True:
            try:
                (self.attempts / str(number)).mkdir(parents=True)
            except FileExistsError:  # two starts at once: the later one takes the next number
                number += 1
            except OSError as err:
                raise ConfigError(
                    f"run.dir={str(self.root)!r} cannot be written: {err.strerror}; give another "
                    "folder"
                ) from None
            else:
                return self.attempts / str(number)

    def claim_attempt(self) -> int:
        """Number of this start: of the newest folder if its start has not begun yet, else new.

        The launcher makes the folder for the ranks' logs; whoever starts ranks in another way
        leaves that to the first rank.
        """
        newest = self.last_attempt()
        if newest < 0 or (self.attempts / str(newest) / _CLAIM).exists():
            newest = int(self.next_attempt().name)
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "unix_time": time.time()}
        (self.attempts / str(newest) / _CLAIM).write_text(json.dumps(facts) + "\n")
        return newest

    def last_attempt(self) -> int:
        """Number of the newest start, -1 before the first."""
        if not self.attempts.is_dir():
            return -1
        numbers = [int(p.name) for p in self.attempts.iterdir() if p.name.isdecimal()]
        return max(numbers, default=-1)

    def remove_partial(self) -> None:
        """Delete what interrupted saves left behind."""
        for path in self.checkpoints.glob(f"{_PARTIAL}_*"):
            # A writer that outlived its killed rank may still add a file: then the folder stays
            # until the next start, and is never mistaken for a checkpoint.
            shutil.rmtree(path, ignore_errors=True)

    def prune(self, keep: int) -> None:
        """Delete all but the newest ``keep`` complete checkpoints."""
        for step in self.steps()[:-keep]:
            doomed = self.checkpoints / f"{_PARTIAL}_pruned_step_{step}"
            self.step(step).rename(doomed)  # never a half-deleted folder under a valid name
            shutil.rmtree(doomed, ignore_errors=True)


def fsync(path: Path) -> None:
    """Force a file, or a folder's list of names, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that is either absent or complete, also after a power loss."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path)
    fsync(path.parent)
