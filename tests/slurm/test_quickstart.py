"""Stage 2 of the quick start as a job on two nodes: told to stop, then a node is switched off."""

import pytest

from examples.quickstart.phases import Phases
from examples.quickstart.run import HERE, QuickStart, Short
from tests.slurm.jobs import Gates, finished, job_id, logs, losses, same_weights, submit, task, wait

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SHORT = Short(images=60, encoder_steps=20, stage_steps=20)


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
    stage2, runs = str(HERE / "stage2.yaml"), [tmp_path / "whole", tmp_path / "run"]
    gates = Gates(tmp_path / "gates", {0: 7, 1: 12})
    for run, way in zip(runs, (submit, gates.submit), strict=True):
        way(stage2, *settings, f"run.dir={run}")
    whole, run = runs
    gates.reached(run, 0)
    nodes.run("scancel", "--signal=USR1", "--batch", job_id(run))
    wait(run, lambda: "USR1: told to save and stop" in logs(run))
    gates.open(0)
    gates.reached(run, 1)
    finished(whole)
    nodes.power_off(nodes.nodes[0])
    finished(run)
    same_weights(run, whole)
    assert losses(run) == losses(whole)
    assert len(losses(run)) == SHORT.stage_steps
    assert (task(run)["restarts"], task(run)["stops"], task(run)["crashes"]) == (2, 1, 0)
