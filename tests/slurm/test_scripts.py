"""What the script of a job does with steps that end in one way or another; no step needs torch."""

import subprocess
import time
from pathlib import Path

import pytest

from megatron_asvr.cli.pipeline import read
from megatron_asvr.cli.planned import plan
from megatron_asvr.launch import slurm
from megatron_asvr.launch.script import Container, Job, Resources, render
from tests.slurm.cluster import NODES

pytestmark = pytest.mark.slurm

LIMIT_S = 120.0
ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "slurm").glob("*/pipeline.yaml"))


def job(folder: Path, step: str, **changes) -> Job:
    """A job whose ranks run some lines of bash; they see the job's folder as ``$FOLDER``."""
    settings = {
        "name": "a job",
        "purpose": "a step of\nseveral lines",
        "command": ["bash", "-c", step],
        "folder": folder,
        "workdir": folder.parent,
        "resources": Resources(nodes=1),
        "environment": {"FOLDER": str(folder)},
    }
    return Job(**{**settings, **changes})


def submitted(made: Job) -> str:
    made.folder.mkdir(parents=True)
    return slurm.submit(made, render(made))


def until(number: str, *wanted: str) -> list[dict[str, str]]:
    """The job's tasks when all are in one of the states."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        tasks = slurm.state(number)
        if {task["JobState"] for task in tasks} <= set(wanted):
            return tasks
        assert time.monotonic() < deadline, tasks
        time.sleep(0.2)


def log(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("*.log")))


def sound(script: str, path: Path) -> None:
    """Fail unless bash reads a script, and shellcheck finds nothing in it."""
    path.write_text(script)
    for checker in (["bash", "-n"], ["shellcheck"]):
        done = subprocess.run([*checker, path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


CONTAINERS = [
    None,
    Container(image="docker://a/b:1", mounts=("/a b:/a b", "/c:/c")),
    Container(image="/images/a b.sif", runtime="apptainer", mounts=("/a b:/a b",)),
]


@pytest.mark.parametrize("container", CONTAINERS, ids=["bare", "pyxis", "apptainer"])
@pytest.mark.parametrize("array", [None, 4])
@pytest.mark.parametrize("usable", [(), (1, 2), (1, 2, 3, 4)])
def test_scripts_are_sound(cluster, tmp_path, container, array, usable):
    made = job(
        tmp_path / 'it\'s "a" folder of %j $x',
        "true",
        name='an "odd" name # \\ $x',
        command=["python", "-m", "it's", "$HOME", "$job/config.yaml"],
        resources=Resources(nodes=2, min_nodes=1, gpus_per_node=8, more=("comment=x # y",)),
        container=container,
        array=array,
        usable=usable,
        preflight=["python", "-m", "look"] if usable else (),
        environment={"A": "it's $x", "B": ""},
    )
    script = render(made)
    sound(script, tmp_path / "job.sh")
    assert "to start at" in slurm.check(script)
    outside = [
        line for line in script.splitlines() if "--container" in line or "apptainer exec" in line
    ]
    assert all(line.startswith(("  srun ", "ranks ")) for line in outside)
    assert bool(outside) == (container is not None)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.parent.name)
def test_recipes_are_sound(cluster, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(ROOT)
    _, steps, _ = read(str(recipe.relative_to(ROOT)))
    made = dict.fromkeys(["assets", "runs"], "an earlier pipeline")
    for name, step in steps.items():
        step.cpus_per_rank, step.sbatch = 1, []  # the nodes of the test are small
        script = render(plan(step, made).job)
        sound(script, tmp_path / f"{name}.sh")
        if (step.nodes[0] or step.nodes[1]) <= NODES:
            assert "to start at" in slurm.check(script)


def test_values_reach_the_step_as_they_are(cluster, tmp_path):
    folder = tmp_path / 'it\'s "a" folder of %j $x'
    values = ["it's", "$HOME", 'a "b"', "\\", "two\nlines", ""]
    step = 'pwd; printf "<%s>" "$ODD" "$@"; echo finished >"$ASVR_OUTCOME"'
    command = ["bash", "-c", step, "name", *values]
    made = job(folder, "", command=command, environment={"ODD": "it's $x"}, workdir=folder)
    until(submitted(made), "COMPLETED")
    said = log(folder)
    assert f"\n{folder}\n" in said
    assert "".join(f"<{value}>" for value in ["it's $x", *values]) in said


def test_a_job_that_is_cancelled_while_it_saves_stays_cancelled(cluster, tmp_path):
    folder = tmp_path / "job"
    save = 'echo stopped >"$ASVR_OUTCOME"; exit 3'
    step = f"trap '{save}' USR1 TERM; touch \"$FOLDER/up\"; while :; do sleep 0.1; done"
    number = submitted(job(folder, step))
    deadline = time.monotonic() + LIMIT_S
    while not (folder / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    slurm.call("scancel", number)
    (task,) = until(number, "CANCELLED")
    assert task["Restarts"] == "0"
    assert "stopped" in log(folder)


def test_a_requeued_job_keeps_off_excluded_nodes(cluster, tmp_path):
    folder = tmp_path / "job"
    step = 'echo "$SLURMD_NODENAME" >>"$FOLDER/hosts"; cp "$FOLDER/hosts" "$FOLDER/exclude"'
    resources = Resources(more=("exclude=asvrnode1",))
    number = submitted(job(folder, step, max_crashes=1, resources=resources))
    (task,) = until(number, "FAILED")
    assert task["Restarts"] == "1"
    first, second = (folder / "hosts").read_text().split()
    assert first != second
    assert "asvrnode1" not in (first, second)
    assert f"not to be taken again: asvrnode1,{first}\n" in log(folder)
    assert "2 crashes, and 1 are allowed: giving up" in log(folder)


def test_nodes_that_fail_the_preflight_are_left_alone(cluster, tmp_path):
    folder = tmp_path / "job"
    look = 'echo "$SLURMD_NODENAME" >>"$FOLDER/looked"; [[ -s $FOLDER/exclude ]] && exit 0; '
    look += 'echo "$SLURMD_NODENAME" >"$ASVR_EXCLUDE"; exit 1'
    step = 'echo "$SLURMD_NODENAME" >>"$FOLDER/ran"; echo finished >"$ASVR_OUTCOME"'
    number = submitted(job(folder, step, preflight=["bash", "-c", look]))
    until(number, "COMPLETED")
    bad, good = (folder / "looked").read_text().split()
    assert bad != good
    assert (folder / "ran").read_text().split() == [good]
    assert f"not to be taken again: {bad}\n" in log(folder)


def test_a_preflight_that_blames_no_node_ends_the_job(cluster, tmp_path):
    folder = tmp_path / "job"
    number = submitted(job(folder, "touch $FOLDER/ran", preflight=["false"]))
    until(number, "FAILED")
    assert not (folder / "ran").exists()


def test_tasks_of_an_array_are_requeued_one_by_one(cluster, tmp_path):
    folder = tmp_path / "array"
    last = "[[ $SLURM_ARRAY_TASK_ID != 3 || ${SLURM_RESTART_COUNT:-0} != 0 ]]"
    step = f'{last} || exit 1; echo "finished" >"$ASVR_OUTCOME"'
    number = submitted(job(folder, step, array=4))
    tasks = until(number, "COMPLETED")
    restarts = {task["ArrayTaskId"]: task["Restarts"] for task in tasks}
    assert restarts == {"0": "0", "1": "0", "2": "0", "3": "1"}
    assert (folder / "3/crashes").read_text() == "1\n"


def test_what_depends_on_a_failed_job_never_starts(cluster, tmp_path):
    step = 'echo refused >"$ASVR_OUTCOME"; exit 1'
    first = submitted(job(tmp_path / "first", step))
    then = job(tmp_path / "second", "touch $FOLDER/ran", after=(first,))
    second = submitted(then)
    until(first, "FAILED")
    until(second, "CANCELLED", "FAILED")
    assert not (tmp_path / "second/ran").exists()
