"""Jobs on a real Slurm: real daemons, real gloo ranks on two nodes."""

import json

import pytest

from tests.slurm.jobs import finished, logs, same_weights, submit, task, wait, write_config

pytestmark = pytest.mark.slurm


def test_a_job_on_two_nodes_trains(undisturbed):
    assert task(undisturbed)["step"] == 8
    assert "finished" in logs(undisturbed)


def test_told_to_stop_it_saves_and_goes_on_by_itself(cluster, files, undisturbed, tmp_path):
    run = tmp_path / "told"
    submit(write_config(files, run))
    wait(run, lambda: (run / "metrics.jsonl").exists())
    job = json.loads((run / "slurm/job.json").read_text())["id"]
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    finished(run)
    same_weights(run, undisturbed)
    assert task(run)["stops"] == 1
