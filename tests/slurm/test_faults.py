"""What a job on two nodes lives through: it goes on by itself, and ends with the same weights.

The long half (marked ``slow``) waits for Slurm's own limits: `make test-slurm`.
"""

import os
import re
import signal

import pytest

from megatron_asvr.checkpoint.folder import RunFolder
from tests.slurm.jobs import (
    STEPS,
    Gates,
    finished,
    job_id,
    logs,
    losses,
    same_weights,
    submit,
    task,
    wait,
    write_config,
)

pytestmark = pytest.mark.slurm


def same_as(run, undisturbed) -> None:
    same_weights(run, undisturbed)
    assert losses(run) == losses(undisturbed)


def published(run) -> dict[str, tuple[int, int]]:
    """Place and time of change of everything in a run's folder but what its script writes."""
    files = (path for path in run.rglob("*") if path.is_file() and path.parent.name != "slurm")
    return {str(file): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def restarts(run) -> tuple[int, int, int]:
    now = task(run)
    return now["restarts"], now["stops"], now["crashes"]


def test_told_to_stop_and_then_killed_it_goes_on_by_itself(cluster, files, undisturbed, tmp_path):
    run, gates = tmp_path / "run", Gates(tmp_path / "gates", {0: 2, 1: 5})
    gates.submit(write_config(files, run))

    gates.reached(run, 0)
    cluster.run("scancel", "--signal=USR1", "--batch", job_id(run))
    wait(run, lambda: "USR1: told to save and stop" in logs(run))
    gates.open(0)
    _, killed = gates.reached(run, 1)
    assert RunFolder(run).steps() == [2, 4]  # 3 or 4, as soon as all ranks knew, and those between
    os.kill(killed, signal.SIGKILL)
    finished(run)
    same_as(run, undisturbed)
    assert restarts(run) == (2, 1, 1)


@pytest.mark.slow
def test_told_to_stop_while_it_starts_it_has_not_crashed(cluster, files, undisturbed, tmp_path):
    run = tmp_path / "run"
    submit(write_config(files, run))
    wait(run, lambda: "start 0: job" in logs(run))  # the ranks import torch for seconds now
    cluster.run("scancel", "--signal=USR1", "--batch", job_id(run))
    finished(run)
    same_as(run, undisturbed)
    assert restarts(run) == (1, 1, 0)


@pytest.mark.slow
def test_the_budget_of_crashes_ends_a_job_and_a_checkpoint_renews_it(
    cluster, files, undisturbed, tmp_path
):
    run = tmp_path / "run"
    gates = Gates(tmp_path / "gates", {0: 3, 1: 5, 2: 5})  # the second one saved step 4 before
    gates.submit(write_config(files, run), "--max-crashes", "1")
    for start in range(3):
        os.kill(gates.reached(run, start)[start % 2], signal.SIGKILL)
    wait(run, lambda: task(run)["state"] == "FAILED")
    assert "2 crashes, and 1 are allowed: giving up" in logs(run)
    assert restarts(run) == (2, 0, 2)


@pytest.mark.slow
def test_the_time_limit_tells_it_to_save_and_ends_it_when_it_does_not(
    cluster, files, undisturbed, tmp_path
):
    run, gates = tmp_path / "run", Gates(tmp_path / "gates", {0: 4, 1: 6})
    gates.submit(write_config(files, run), "--time=2", "--warning=20")
    gates.reached(run, 0)
    wait(run, lambda: logs(run).count("USR1: told to save and stop") == 1)
    gates.open(0)
    gates.reached(run, 1)
    wait(run, lambda: "the time limit came before the ranks had saved" in logs(run))
    finished(run)
    same_as(run, undisturbed)
    assert restarts(run) == (2, 1, 1)


@pytest.mark.slow
def test_preempted_by_a_higher_partition_it_saves_and_comes_back(
    nodes, files, undisturbed, tmp_path
):
    run, gates = tmp_path / "run", Gates(tmp_path / "gates", {0: 4})
    gates.submit(write_config(files, run))
    gates.reached(run, 0)
    urgent = ["--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null"]
    number = nodes.run("sbatch", "--parsable", *urgent, "--wrap", "sleep 900").strip()
    wait(run, lambda: "USR1: told to save and stop" in logs(run))
    gates.open(0)
    wait(run, lambda: "RUNNING" in nodes.run("squeue", "-h", "-j", number, "-o", "%T"))
    assert task(run)["state"] == "PENDING"
    nodes.run("scancel", number)
    finished(run)
    same_as(run, undisturbed)
    assert restarts(run) == (1, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_a_node_that_is_switched_off_is_replaced(nodes, files, undisturbed, tmp_path, node):
    run, gates = tmp_path / "run", Gates(tmp_path / "gates", {0: 5})
    gates.submit(write_config(files, run))
    gates.reached(run, 0)
    nodes.power_off(nodes.nodes[node])
    finished(run)
    same_as(run, undisturbed)
    assert task(run)["restarts"] == 1
    assert nodes.nodes[node] not in logs(run).rpartition(" on ")[2]


@pytest.mark.slow
def test_a_step_that_outlives_its_daemons_can_write_nothing_any_more(
    nodes, files, undisturbed, tmp_path
):
    run, gates = tmp_path / "run", Gates(tmp_path / "gates", {0: 3, 1: 5})
    gates.submit(write_config(files, run))
    old = gates.reached(run, 0)
    for node in nodes.nodes[:2]:
        nodes.kill_daemon(node)
    gates.reached(run, 1)  # the new start, on the other two nodes, after it saved step 4
    assert all(os.path.exists(f"/proc/{rank}") for rank in old)
    before, lines = published(run), losses(run)
    gates.open(0)
    wait(run, lambda: not any(os.path.exists(f"/proc/{rank}") for rank in old))
    (word,) = (run / "slurm").glob("outcome.*.0")  # its output is lost, srun is gone
    assert re.match(r"refused CheckpointError: attempt 1 of .* has started since", word.read_text())
    assert (published(run), losses(run)) == (before, lines)
    gates.open(1)
    finished(run)
    same_as(run, undisturbed)
    assert task(run)["restarts"] == 1


@pytest.mark.slow
def test_it_goes_on_with_fewer_and_with_more_nodes(nodes, files, tmp_path):
    whole = tmp_path / "whole"
    submit(write_config(files, whole, parallel__tp=1))
    run, gates = tmp_path / "run", Gates(tmp_path / "gates", {0: 3, 1: 5})
    gates.submit(write_config(files, run, parallel__tp=1), nodes="1-3")
    gates.reached(run, 0)
    assert "uses 2 of 3 nodes; idle: asvrnode3" in logs(run)
    finished(whole)
    nodes.run("scontrol", "update", "NodeName=asvrnode[2-4]", "State=DRAIN", "Reason=test")
    nodes.power_off("asvrnode2")
    gates.reached(run, 1, ranks=1)
    assert "dp 1 instead of 2" in logs(run)
    nodes.run("scontrol", "update", "NodeName=asvrnode[3-4]", "State=RESUME")
    nodes.run("scancel", "--signal=USR1", "--batch", job_id(run))
    wait(run, lambda: "USR1: told to save and stop" in logs(run))
    gates.open(1)
    finished(run)
    assert "dp 2 instead of 1" in logs(run)
    wanted, got = losses(whole), losses(run)
    assert [line[0] for line in got] == [line[0] for line in wanted]
    assert [line[-1] for line in got] == [line[-1] for line in wanted]  # the samples, in order
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine[1:-1] == pytest.approx(theirs[1:-1], rel=0, abs=1e-6)
    assert losses(run)[-1][0] == STEPS
