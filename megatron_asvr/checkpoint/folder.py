"""The run folder: one place that knows where everything of a run lies.

    config.yaml          the resolved configuration of the last start
    metrics.jsonl        one line per logged step or evaluation
    wandb_id             of the run for wandb, if it is used
    bad_samples.jsonl    split, source, id, image and reason of every sample that cannot be used
    skipped_samples.jsonl  samples left out because a step's numbers could not be right
    checkpoints/step_N/  complete checkpoints: the trained weights, optimizer and resume state
    frozen/              weights that are not trained, written once, named by their content
    attempts/K/          of the K-th start: rank logs, who started it, what it continued from

A checkpoint appears under its final name by one rename, when all of it is on disk, so a folder
``step_N`` is complete by construction; anything unfinished carries another name.

Starts are numbered, and only the newest may publish anything. A start first takes its number, then
moves away what earlier starts left unfinished, then looks for the newest checkpoint; a writer uses
a name with its number, looks whether a newer number was taken, then renames. So an old writer
either publishes before the new start looks, or finds that what it wrote is gone. Lines of metrics
go to the file that the start itself gave its name: an older one adds to a file that nobody sees.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_asvr.errors import CheckpointError, ConfigError

META = "meta.json"
_STEP = re.compile(r"step_(\d+)")
_PARTIAL = ".partial"
_DAMAGED = "damaged"
_CLAIM = "start.json"
_RESUME = "resume.json"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run.

    Args:
        root: the folder, which need not exist yet.
    """

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))

    @contextlib.contextmanager
    def being_written(self) -> Iterator[None]:
        """Around the writing of something that a start cannot do without.

        Raises:
            CheckpointError: the file system refuses it.
        """
        try:
            yield
        except OSError as err:
            raise CheckpointError(
                f"{err.filename or self.root} cannot be written: {err.strerror}; make room or "
                "give another run.dir. Checkpoints written before are untouched"
            ) from err

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Logged steps and evaluations, one JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def bad_samples(self) -> Path:
        """Samples that cannot be used, one JSON object a line."""
        return self.root / "bad_samples.jsonl"

    @property
    def skipped(self) -> Path:
        """Steps that were left out, with their samples, one JSON object a line."""
        return self.root / "skipped_samples.jsonl"

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

    def events(self) -> list[dict[str, Any]]:
        """Steps that were left out, oldest first."""
        if not self.skipped.exists():
            return []
        lines = self.skipped.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def attempt(self, number: int) -> Path:
        """Folder of one start."""
        return self.attempts / str(number)

    def step(self, step: int) -> Path:
        """Folder of the checkpoint of ``step``."""
        return self.checkpoints / f"step_{step}"

    def partial(self, step: int, attempt: int) -> Path:
        """Where attempt ``attempt`` writes the checkpoint of ``step`` before it is complete."""
        return self.checkpoints / f"{_PARTIAL}_step_{step}_attempt_{attempt}"

    def candidates(self) -> list[int]:
        """Steps of all folders with the name of a checkpoint, ascending, whatever they hold."""
        if not self.checkpoints.is_dir():
            return []
        found = (_STEP.fullmatch(p.name) for p in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        return [step for step in self.candidates() if (self.step(step) / META).is_file()]

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
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "unix_time": time.time()}
        while True:
            if newest < 0:
                newest = int(self.next_attempt().name)
            try:
                with (self.attempts / str(newest) / _CLAIM).open("x") as stream:
                    stream.write(json.dumps(facts) + "\n")
            except FileExistsError:  # taken, perhaps by another start at this very moment
                newest = -1
            else:
                return newest

    def last_attempt(self) -> int:
        """Number of the newest folder ``attempts/K``, -1 before the first."""
        return max(self._attempts(), default=-1)

    def last_start(self) -> int:
        """Number of the newest start that claimed the run, -1 before the first.

        One that was refused before, for its settings say, takes the run from nobody.
        """
        claimed = (k for k in self._attempts() if (self.attempts / str(k) / _CLAIM).is_file())
        return max(claimed, default=-1)

    def _attempts(self) -> list[int]:
        if not self.attempts.is_dir():
            return []
        return [int(p.name) for p in self.attempts.iterdir() if p.name.isdecimal()]

    def require_newest(self, attempt: int) -> None:
        """Return while ``attempt`` is the newest start.

        Raises:
            CheckpointError: another one has started since.
        """
        newest = self.last_start()
        if newest > attempt:
            # A scheduler may start a job again while ranks of the old attempt are still alive.
            raise CheckpointError(
                f"attempt {newest} of {self.root} has started since, so attempt {attempt} must not "
                "go on; it stops here. Give a second run a run.dir of its own"
            )

    def unfinished(self, path: Path, attempt: int) -> Path:
        """Where attempt ``attempt`` writes the file ``path`` before it is complete."""
        return path.with_name(f"{_PARTIAL}_{path.name}_attempt_{attempt}")

    def give_name(self, unfinished: Path, path: Path, attempt: int) -> None:
        """Publish what attempt ``attempt`` has written.

        Raises:
            CheckpointError: another start has begun since.
            OSError: the system refuses it.
        """
        self.require_newest(attempt)
        try:
            unfinished.rename(path)
        except FileNotFoundError:
            self.require_newest(attempt)  # whose start removed it
            raise
        fsync(path.parent)

    @contextlib.contextmanager
    def written(self, path: Path, attempt: int) -> Iterator[Path]:
        """Around the writing of one file: where to write it; afterwards it has its name.

        Raises:
            CheckpointError: another start has begun since.
        """
        unfinished = self.unfinished(path, attempt)
        yield unfinished
        fsync(unfinished)
        self.give_name(unfinished, path, attempt)

    def remove_partial(self) -> None:
        """Delete what interrupted starts left behind."""
        for path in self.checkpoints.glob(f"{_PARTIAL}_*"):
            self.delete(path)
        for folder in (self.root, self.frozen):
            for path in folder.glob(f"{_PARTIAL}_*"):
                path.unlink(missing_ok=True)

    def doomed(self, keep: int, keep_every: int, *, protect: Collection[int] = ()) -> list[int]:
        """Steps of the complete checkpoints that a policy lets go, ascending.

        Args:
            keep: newest ones to keep.
            keep_every: also keep those of every so many steps; 0 is none.
            protect: steps to keep in any case.
        """
        old = self.steps()[:-keep]
        return [s for s in old if s not in protect and not (keep_every and s % keep_every == 0)]

    def set_aside(self, step: int, attempt: int) -> None:
        """Take the name from a checkpoint that is damaged, so that it is not tried again."""
        self.step(step).rename(self.checkpoints / f"{_DAMAGED}_step_{step}_attempt_{attempt}")

    def damaged(self) -> list[Path]:
        """Folders of checkpoints that were set aside."""
        return sorted(self.checkpoints.glob(f"{_DAMAGED}_step_*"))

    def note_resume(self, attempt: int, facts: Mapping[str, Any]) -> None:
        """Leave what a start continued from in the folder of its attempt."""
        text = json.dumps(facts, indent=1) + "\n"
        write_durably(self.attempts / str(attempt) / _RESUME, text.encode())

    def delete(self, path: Path) -> None:
        """Delete a folder that may have a valid name, or a writer that is still alive."""
        doomed = self.checkpoints / f"{_PARTIAL}_deleted_{path.name.lstrip('.')}_{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            path.rename(doomed)
        # A writer that outlived its killed rank may still add a file: then the folder stays until
        # the next start, and is never mistaken for a checkpoint.
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
