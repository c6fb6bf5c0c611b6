"""Small real runs as jobs: submit them, wait at places, compare what came out."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import torch

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.reader import read_run, weight_names
from megatron_asvr.cli.main import main
from megatron_asvr.cli.slurm import status_of
from megatron_asvr.config.load import save as save_config
from tests.run_data import run_config

LIMIT_S = 600.0
STEPS = 8
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def write_config(files: Path, run: Path, **changes: Any) -> str:
    path = run.parent / f"{run.name}.yaml"
    settings = {"parallel__tp": 2, "train__steps": STEPS, **changes}
    save_config(run_config(files, run, **settings), path)
    return str(path)


def submit(config: str, *more: str) -> None:
    assert main(["slurm", "submit", config, "--nodes", "2", *more]) == 0


def task(run: Path) -> dict[str, Any]:
    (only,) = status_of(run / "slurm")["tasks"]
    return only


def wait(run: Path, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, logs(run)
        time.sleep(0.3)


def finished(run: Path) -> None:
    wait(run, lambda: task(run)["state"] in OVER)
    assert task(run)["state"] == "COMPLETED", logs(run)


def logs(run: Path) -> str:
    return "\n".join(path.read_text() for path in (run / "slurm").glob("*.log"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    _, get = read_run(run)
    return {name: get(name) for name in weight_names(RunFolder(run).step(STEPS))}


def same_weights(run: Path, other: Path) -> None:
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
