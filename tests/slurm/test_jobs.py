"""Jobs on a real Slurm: real daemons, real gloo ranks on two nodes."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
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
from tests.run_data import make_files, run_config
from tests.slurm.cluster import Cluster, missing, started

pytestmark = pytest.mark.slurm

LIMIT_S = 600.0


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if (why := missing()) is not None:
        if "slurm" in os.environ.get("ASVR_REQUIRE", ""):
            pytest.fail(why)
        pytest.skip(why)
    # Not below pytest's own folder: munge wants everybody to be able to reach its socket.
    with tempfile.TemporaryDirectory(prefix="asvr-slurm-") as folder, started(Path(folder)) as made:
        yield made


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("jobs") / "files")


def write_config(files: Path, run: Path, **changes: Any) -> str:
    path = run.parent / f"{run.name}.yaml"
    settings = {"parallel__tp": 2, "train__steps": 8, **changes}
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
    wait(run, lambda: task(run)["state"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
    assert task(run)["state"] == "COMPLETED", logs(run)


def logs(run: Path) -> str:
    return "\n".join(path.read_text() for path in (run / "slurm").glob("*.log"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    _, get = read_run(run)
    return {name: get(name) for name in weight_names(RunFolder(run).step(8))}


@pytest.fixture(scope="session")
def undisturbed(cluster, files, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    submit(write_config(files, run))
    finished(run)
    return run


def same_weights(run: Path, other: Path) -> None:
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_a_job_on_two_nodes_trains(undisturbed):
    assert task(undisturbed)["step"] == 8
    assert "finished" in logs(undisturbed)


def test_told_to_stop_it_saves_and_goes_on_by_itself(cluster, files, undisturbed, tmp_path):
    run = tmp_path / "told"
    config = write_config(files, run, train__steps=8)
    submit(config)
    wait(run, lambda: (run / "metrics.jsonl").exists())
    job = json.loads((run / "slurm/job.json").read_text())["id"]
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    finished(run)
    same_weights(run, undisturbed)
    assert task(run)["stops"] == 1
