"""Faults against runs that save after every step: killed ranks, full disks, flipped bits.

A start of a run is disturbed at a random instant, then the run is started again, until it finishes;
then the next run begins. After every start the newest checkpoint that is whole, found here without
the code under test, must be the one the next start continues from. A run that finishes must have
the weights of an undisturbed one, bit for bit.
"""

import collections
import contextlib
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import torch
import torch.distributed as dist

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.meta import read_meta
from megatron_asvr.checkpoint.reader import read_run
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import LaunchError
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.train.loop import train
from tests.run_data import make_files, run_config

STEPS = 40  # of a run
RANKS = 2
TIMEOUT_S = 900.0
DISK_BYTES = 24 << 20  # the small disk: room for a few checkpoints more than are kept
SAVE_S = 0.15  # a save takes about that long: kills fall into such a window from its start
FILLER = "filler"
Fault = dict[str, Any]


class LostError(Exception):
    """A run that did not survive a fault."""


def new_config(files: Path, name: str, **changes: Any) -> Config:
    """A run that saves after every step and keeps three checkpoints."""
    settings = {
        "parallel__tp": RANKS,
        "train__steps": STEPS,
        "train__save_every_steps": 1,
        "train__keep_checkpoints": 3,
        "train__log_every_steps": STEPS,
        **changes,
    }
    return run_config(files, files.parent / name, **settings)


def disturbed_train(config: Config, fault: Fault) -> dict[str, Any]:
    """Train in a rank; the rank that the fault names does it to itself."""
    if dist.get_rank() == fault["rank"]:
        threading.Thread(target=DISTURBANCES[fault["kind"]], args=(config, fault)).start()
    return train(config)


def kill(config: Config, fault: Fault) -> None:
    """End this process without warning, some time after a save has begun."""
    wait_for_save(config, fault)
    time.sleep(fault["delay"])
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_save(config: Config, fault: Fault) -> None:
    """Return when a save begins, after as many as the fault says."""
    folder, seen = RunFolder(config.run.dir), set()
    name = f".partial_step_*_attempt_{fault['attempt']}"
    while len(seen) < fault["saves"]:
        if not threading.main_thread().is_alive():
            sys.exit()  # of this thread: there was none
        seen |= {path.name for path in folder.checkpoints.glob(name)}
        time.sleep(0.001)


def fill_disk(config: Config, fault: Fault) -> None:
    """Leave no room on the disk until a save has failed, as often as the fault says."""
    folder = RunFolder(config.run.dir)
    for number in range(fault["times"]):
        wait_for_save(config, fault)
        told = failed_saves(folder)
        with no_room(folder):
            while failed_saves(folder) == told and threading.main_thread().is_alive():
                time.sleep(0.005)
            if fault["kill"] and number == fault["times"] - 1:
                os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def no_room(folder: RunFolder) -> Iterator[None]:
    """Inside, the system refuses to write more: the disk is full, or files may not grow."""
    if not folder.checkpoints.is_mount():
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        return
    filler = folder.checkpoints / FILLER
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(1 << 12))
    yield
    filler.unlink()


def failed_saves(folder: RunFolder) -> int:
    """Lines about failed saves in metrics.jsonl."""
    return folder.metrics.read_text().count('"kind": "save"')


DISTURBANCES = {"kill": kill, "full": fill_disk}


def flip_bit(folder: RunFolder, chance: random.Random) -> str:
    """Where one bit was changed: in the newest checkpoint, or in weights that are not trained."""
    files = [*folder.step(folder.latest()).iterdir()]
    if chance.random() < 0.2:
        files = [*folder.frozen.iterdir()]
    path = chance.choice(sorted(files))
    data = bytearray(path.read_bytes())
    bit = chance.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"{path.parent.name}/{path.name}, bit {bit}"


def newest_whole(folder: RunFolder) -> int:
    """Step of the newest checkpoint whose files have the recorded checksums; 0 without any."""
    for step in reversed(folder.candidates()):
        path = folder.step(step)
        try:
            tree = json.loads((path / "meta.json").read_text())
            own = tree.pop("sha256")
            text = json.dumps(tree, indent=1, sort_keys=True)
            sums = {name: facts["sha256"] for name, facts in tree["files"].items()}
            found = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in sums}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if found == sums and own == hashlib.sha256(text.encode()).hexdigest():
            return step
    return 0


@contextlib.contextmanager
def small_disk(folder: RunFolder, *, wanted: bool) -> Iterator[bool]:
    """Whether the run's checkpoints lie on a small file system of their own (it takes root)."""
    folder.checkpoints.mkdir(parents=True)
    if not wanted:
        yield False
        return
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder.checkpoints]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder.checkpoints], check=True)


class Torture:
    """Runs under faults, and what became of them.

    Args:
        root: an empty folder.
        seed: of everything random.
        mount: put checkpoints on a small disk, where that is allowed; else files may not grow.
    """

    def __init__(self, root: Path, seed: int, *, mount: bool = True) -> None:
        self._mount = mount
        self.chance = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self._files = make_files(root / "files")
        whole = new_config(self._files, "whole", train__save_every_steps=STEPS)
        run_ranks(train, (whole,), RANKS, timeout_s=TIMEOUT_S)
        self._wanted = self._weights(RunFolder(whole.run.dir))

    def faults(self, *, kills: int, full: int, flips: int) -> list[Fault]:
        """That many faults in random order; full disks come up to five to a start."""
        plan: list[Fault] = [{"kind": "kill", "flip": number < flips} for number in range(kills)]
        while full:
            times = min(full, self.chance.randint(1, 5))
            plan.append({"kind": "full", "times": times, "flip": False})
            full -= times
        self.chance.shuffle(plan)
        return plan

    def run(self, faults: list[Fault]) -> dict[str, int]:
        """Counts, after all faults have happened and every run has finished.

        Raises:
            LostError: a run did not survive.
        """
        left = collections.deque(faults)
        number = 0
        while left:
            config = new_config(
                self._files, f"run_{number}", train__async_save=self.chance.random() < 0.5
            )
            folder = RunFolder(config.run.dir)
            with small_disk(folder, wanted=self._mount) as mounted:
                self.counts["runs on a small disk"] += mounted
                while not self._start(config, folder, left):
                    pass
                self._same_weights(folder)
            self.counts["runs"] += 1
            number += 1
        return dict(self.counts)

    def _start(self, config: Config, folder: RunFolder, left: collections.deque[Fault]) -> bool:
        """Whether the run has finished, after one more start with the next fault."""
        fault = dict(left[0]) if left else {"kind": "none", "flip": False}
        fault |= {
            "rank": self.chance.randrange(RANKS) if left else -1,
            "saves": self.chance.randint(1, 4),
            "delay": self.chance.uniform(0, SAVE_S),
            "kill": self.chance.random() < 0.5,
        }
        damaged = None
        if fault["flip"] and len(folder.steps()) > 1:
            damaged = flip_bit(folder, self.chance)
        wanted, attempt = newest_whole(folder), folder.last_attempt() + 1
        fault["attempt"] = attempt
        told = failed_saves(folder) if folder.metrics.exists() else 0
        try:
            result = run_ranks(disturbed_train, (config, fault), RANKS, timeout_s=TIMEOUT_S)
            finished = result["finished"]
        except LaunchError as err:
            if "killed by SIGKILL" not in str(err).splitlines()[1]:
                raise LostError(f"{fault}, {damaged}: {err}") from None
            finished = False
        note = json.loads((folder.attempts / str(attempt) / "resume.json").read_text())
        if (note["step"] or 0) != wanted:
            raise LostError(f"{note}, but step {wanted} is the newest whole one; {damaged}")
        self.counts["starts"] += 1
        self.counts["resumed from the newest good checkpoint"] += wanted > 0
        self.counts["checkpoints skipped"] += len(note["skipped"])
        self._count(folder, fault, left, told, damaged, finished)
        return finished

    def _count(
        self,
        folder: RunFolder,
        fault: Fault,
        left: collections.deque[Fault],
        told: int,
        damaged: str | None,
        finished: bool,
    ) -> None:
        """Note which faults happened; one that did not stays in line."""
        if damaged is not None:
            self.counts["bit flips"] += 1
            left[0]["flip"] = False
        if fault["kind"] == "full":
            done = min(fault["times"], failed_saves(folder) - told)
            self.counts["saves on a full disk"] += done
            left[0]["times"] -= done
            if not left[0]["times"]:
                left.popleft()
            (folder.checkpoints / FILLER).unlink(missing_ok=True)
        elif fault["kind"] == "kill" and not finished:
            if any(folder.checkpoints.glob(".partial_*")):
                self.counts["saves killed"] += 1
                if not left[0]["flip"]:
                    left.popleft()
            else:
                self.counts["killed between saves"] += 1

    def _same_weights(self, folder: RunFolder) -> None:
        got = self._weights(folder)
        if wrong := [name for name, x in self._wanted.items() if not torch.equal(x, got[name])]:
            raise LostError(f"{folder.root}: {len(wrong)} weights differ, for example {wrong[0]}")

    @staticmethod
    def _weights(folder: RunFolder) -> dict[str, torch.Tensor]:
        _, get = read_run(folder.root)
        return {name: get(name) for name in read_meta(folder.step(STEPS)).trained}
