"""Small real runs as jobs: submit them, wait at places, compare what came out."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.reader import read_run, weight_names
from megatron_asvr.cli.main import main
from megatron_asvr.cli.slurm import status_of
from megatron_asvr.config.load import save as save_config
from tests.run_data import run_config
from tests.slurm import gated

LIMIT_S = 600.0
STEPS = 8
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def write_config(files: Path, run: Path, **changes: Any) -> str:
    path = run.parent / f"{run.name}.yaml"
    settings = {"parallel__tp": 2, "train__steps": STEPS, "train__watchdog__hang_s": 0.0}
    settings |= changes
    save_config(run_config(files, run, **settings), path)
    return str(path)


def submit(config: str, *more: str, nodes: str = "2") -> None:
    assert main(["slurm", "submit", config, "--nodes", nodes, "--no-preflight", *more]) == 0


class Gates:
    """Places where the ranks of a run wait, see ``gated``.

    Args:
        folder: an empty one.
        steps: for the number of a start, the step before which its ranks wait.
    """

    def __init__(self, folder: Path, steps: Mapping[int, int]) -> None:
        self.folder, self.steps = folder, dict(steps)
        folder.mkdir()

    def submit(self, config: str, *more: str, nodes: str = "2") -> None:
        """Submit a run whose ranks wait there."""
        python = self.folder / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.slurm.gated "$@"\n')
        python.chmod(0o755)
        value = {"folder": str(self.folder), "steps": self.steps}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(gated.VARIABLE, json.dumps(value))
            patch.setattr(sys, "executable", str(python))
            submit(config, *more, nodes=nodes)

    def reached(self, run: Path, start: int, ranks: int = 2) -> list[int]:
        """Process ids of the ranks, when all of them wait there."""
        files = [self.folder / f"{start}.rank_{rank}" for rank in range(ranks)]
        wait(run, lambda: all(file.exists() for file in files))
        return [int(file.read_text()) for file in files]

    def open(self, start: int) -> None:
        """Let them go on."""
        (self.folder / f"{start}.open").touch()


def job_id(run: Path) -> str:
    return json.loads((run / "slurm/job.json").read_text())["id"]


def losses(run: Path) -> list[tuple[Any, ...]]:
    """Step, losses and hash of the samples of every logged line of training."""
    lines = [json.loads(line) for line in RunFolder(run).metrics.open(encoding="utf-8")]
    names = ("step", "loss", "text_loss", "visual_loss", "data_hash")
    return [tuple(line[name] for name in names) for line in lines if line["kind"] == "train"]


def task(run: Path) -> dict[str, Any]:
    (only,) = status_of(run / "slurm")["tasks"]
    return only


def wait(run: Path, condition: Callable[[], bool]) -> None:
    poll(condition, lambda: logs(run))


def poll(condition: Callable[[], bool], text: Callable[[], str]) -> None:
    """Wait for a condition, and show a text when it does not come."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, text()
        time.sleep(0.3)


def finished(run: Path) -> None:
    wait(run, lambda: task(run)["state"] in OVER)
    assert task(run)["state"] == "COMPLETED", logs(run)


def logs(run: Path) -> str:
    return "\n".join(path.read_text() for path in (run / "slurm").glob("*.log"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    _, get = read_run(run)
    latest = RunFolder(run).latest()
    assert latest is not None
    return {name: get(name) for name in weight_names(RunFolder(run).step(latest))}


def same_weights(run: Path, other: Path) -> None:
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
