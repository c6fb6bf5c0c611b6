"""Stage 2 of the quick start as a job on two nodes that meets everything a job can meet."""

import os
import re
import signal

import pytest

from examples.quickstart.phases import Phases
from examples.quickstart.run import HERE, QuickStart, Short
from tests.slurm.jobs import Gates, finished, job_id, logs, losses, same_weights, submit, task, wait

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SHORT = Short(images=60, encoder_steps=20, stage_steps=20)


def hosts(run) -> list[str]:
    """Nodes of the newest start."""
    return re.findall(r"start \d+: job \S+ on ([^:]+):", logs(run))[-1].split()


def told(run, times: int) -> None:
    wait(run, lambda: logs(run).count("USR1: told to save and stop") == times)


def test_stage_2_ends_with_the_same_weights(nodes, tmp_path):
    quick = QuickStart(out=tmp_path / "quick", short=SHORT)
    before = [phase for phase in quick.phases() if phase.name != "stage2"][:6]
    assert before[-1].name == "stage1"
    phases = Phases(folder=tmp_path / "phases", say=lambda _: None)
    for phase in before:
        phases.do(phase)
    settings = quick._paths("stage2", "stage1")
    settings += [f"train.steps={SHORT.stage_steps}", "train.save_every_steps=5"]
    settings += ["train.log_every_steps=1", "train.watchdog.hang_s=0"]
    stage2, whole, run = str(HERE / "stage2.yaml"), tmp_path / "whole", tmp_path / "run"
    submit(stage2, *settings, f"run.dir={whole}")
    finished(whole)
    gates = Gates(tmp_path / "gates", {0: 4, 1: 7, 2: 10, 3: 13, 4: 17})
    gates.submit(stage2, *settings, f"run.dir={run}", "--time=2", "--warning=20")

    gates.reached(run, 0)
    told(run, 1)  # by the time limit
    nodes.run("scontrol", "update", f"JobId={job_id(run)}", "TimeLimit=UNLIMITED")
    gates.open(0)

    gates.reached(run, 1)
    urgent = ["--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null"]
    number = nodes.run("sbatch", "--parsable", *urgent, "--wrap", "sleep 900").strip()
    told(run, 2)  # by the higher partition
    gates.open(1)
    wait(run, lambda: "RUNNING" in nodes.run("squeue", "-h", "-j", number, "-o", "%T"))
    nodes.run("scancel", number)

    os.kill(gates.reached(run, 2)[1], signal.SIGKILL)

    gates.reached(run, 3)
    (lost, _) = hosts(run)
    nodes.power_off(lost)

    old = gates.reached(run, 4)
    nodes.power_on(lost)
    for host in hosts(run):
        nodes.kill_daemon(host)
    finished(run)
    assert all(os.path.exists(f"/proc/{rank}") for rank in old)
    gates.open(4)
    wait(run, lambda: not any(os.path.exists(f"/proc/{rank}") for rank in old))

    same_weights(run, whole)
    assert losses(run) == losses(whole)
    assert len(losses(run)) == SHORT.stage_steps
    assert (task(run)["restarts"], task(run)["stops"], task(run)["crashes"]) == (5, 2, 1)
