"""Jobs on a real Slurm: real daemons, real gloo ranks on two nodes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_asvr.checkpoint.reader import read_run
from megatron_asvr.cli.main import main
from megatron_asvr.cli.slurm import folders, status_of
from tests.slurm.jobs import logs, submit, task, wait, write_config

pytestmark = pytest.mark.slurm


def test_a_job_on_two_nodes_trains(undisturbed):
    assert task(undisturbed)["step"] == 8
    assert "finished" in logs(undisturbed)


def test_a_job_that_slurm_has_forgotten_is_known_from_its_folder(undisturbed, tmp_path, capsys):
    run = tmp_path / "copy"
    shutil.copytree(undisturbed, run)
    facts = json.loads((run / "slurm/job.json").read_text())
    (run / "slurm/job.json").write_text(json.dumps({**facts, "id": "99999999"}))
    assert main(["slurm", "status", str(run)]) == 0
    said = capsys.readouterr().out
    assert "FORGOTTEN, step 8/8, loss " in said
    assert "last word: finished" in said
    assert main(["slurm", "requeue", str(run)]) == 1
    assert "submit it again" in capsys.readouterr().err


def pipeline(folder: Path, steps: dict[str, Any]) -> Path:
    """A submitted pipeline: the folder that knows its jobs."""
    (folder / "steps.yaml").write_text(json.dumps({"dir": str(folder / "all"), "steps": steps}))
    assert main(["slurm", "pipeline", str(folder / "steps.yaml")]) == 0
    return folder / "all"


def states(place: Path) -> list[str]:
    """State of every job of a pipeline, in its order."""
    return [status_of(folder)["tasks"][0]["state"] for folder in folders(str(place))]


@pytest.mark.slow
def test_a_sweep_is_four_runs(cluster, files, tmp_path, capsys):
    run = tmp_path / "sweep"
    config = write_config(files, run, train__steps=2, parallel__tp=1)
    submit(config, "--sweep", "run.seed=1,2", "--sweep", "train.optim.lr=1e-3,2e-3", nodes="1")
    capsys.readouterr()

    def over() -> bool:
        tasks = status_of(run / "slurm")["tasks"]
        return all(task["state"] == "COMPLETED" for task in tasks)

    wait(run, over)
    assert main(["slurm", "status", str(run)]) == 0
    said = capsys.readouterr().out
    for number in range(4):
        assert f"task {number}, COMPLETED" in said
        made = read_run(run / str(number))[0]
        assert made.run.seed == 1 + number // 2
        assert made.train.optim.lr == (1e-3, 2e-3)[number % 2]
    assert said.count("step 2/2") == 4


@pytest.mark.slow
def test_steps_of_a_pipeline_follow_one_another(cluster, files, tmp_path, capsys):
    config = write_config(files, tmp_path / "first", train__steps=2)
    second, model = tmp_path / "second", tmp_path / "hf"
    steps = {
        "index": {"command": f"data index {config}"},
        "first": {"command": f"train {config}", "nodes": 2},
        "second": {
            "command": f"train {config} run.dir={second} init.all={tmp_path}/first",
            "ranks-per-node": 2,
        },
        "out": {"command": f"convert export {second} --out {model}"},
        "proof": {"command": f"convert verify {second} {model}"},
    }
    place = pipeline(tmp_path, steps)
    assert states(place)[1:] == ["PENDING"] * 4
    capsys.readouterr()
    assert main(["slurm", "logs", "-f", str(second)]) == 0  # until it is over
    said = capsys.readouterr().out
    assert "software" in said  # the nodes were looked at
    assert "step ended with status 0: finished" in said
    wait(tmp_path, lambda: states(place) == ["COMPLETED"] * 5)
    assert main(["slurm", "status", str(place)]) == 0
    said = capsys.readouterr().out
    assert said.count("COMPLETED") == 5
    assert said.count("step 2/2") == 2
    assert (model / "config.json").is_file()
    assert str(tmp_path / "first") in logs(second)  # where its weights come from


@pytest.mark.slow
def test_a_cancelled_pipeline_is_over(cluster, files, tmp_path, capsys):
    many = {"train__steps": 100_000, "train__save_every_steps": 100_000}
    first = write_config(files, tmp_path / "first", **many)
    steps = {
        "first": {"command": f"train {first}", "nodes": 2, "no-preflight": True},
        "second": {"command": f"train {first} run.dir={tmp_path}/second", "nodes": 2},
    }
    place = pipeline(tmp_path, steps)
    wait(tmp_path / "first", lambda: (tmp_path / "first/metrics.jsonl").exists())
    assert states(place) == ["RUNNING", "PENDING"]
    assert main(["slurm", "submit", first, "--nodes", "2"]) == 1
    assert "cancel it first" in capsys.readouterr().err
    assert main(["slurm", "cancel", str(place)]) == 0
    wait(tmp_path / "first", lambda: states(place) == ["CANCELLED"] * 2)
    assert task(tmp_path / "first")["restarts"] == 0
    assert main(["slurm", "ls", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("CANCELLED") == 2
