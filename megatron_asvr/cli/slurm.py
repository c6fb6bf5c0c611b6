"""`asvr slurm`: run any command of ours as jobs of Slurm, and look after them."""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_asvr.cli import pipeline, submit
from megatron_asvr.cli.planned import FOLDER
from megatron_asvr.errors import LaunchError
from megatron_asvr.launch import slurm
from megatron_asvr.log import clock

GONE = "FORGOTTEN"  # by Slurm, a while after its end
LOOK_S = 1.0
NUMBERS = ("step", "loss", "text_loss", "visual_loss", "step_s")


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("slurm", help="submit jobs to Slurm and look after them")
    parser.set_defaults(takes_overrides=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    submit.add(actions.add_parser("submit", help="check everything, write a script, submit it"))
    pipeline.add(actions.add_parser("pipeline", help="submit steps that wait for one another"))
    for name, run, text in (
        ("status", run_status, "state, step, losses, time left and restarts"),
        ("logs", run_logs, "print what a job has printed"),
        ("cancel", run_cancel, "end a job, or all of a pipeline that are not over"),
        ("requeue", run_requeue, "start a job again, from its newest checkpoint"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument(
            "run_dir", metavar="RUN", help="run folder, folder of a job or of a pipeline"
        )
        action.set_defaults(run=run)
        if name == "status":
            action.add_argument("--json", action="store_true", help="print it as JSON")
        if name == "logs":
            action.add_argument(
                "-f", "--follow", action="store_true", help="go on until the job is over"
            )
    listing = actions.add_parser("ls", help="all jobs whose folders lie below a folder")
    listing.add_argument("root", nargs="?", default="runs")
    listing.set_defaults(run=run_ls)


def folders(path: str) -> list[Path]:
    """The folders of the jobs that a path stands for, in the order of a pipeline."""
    if (Path(path) / pipeline.STEPS).is_file():
        steps = json.loads((Path(path) / pipeline.STEPS).read_text(encoding="utf-8"))
        return [Path(folder) for folder in steps.values()]
    return [submit.job_folder(path)]


def _one(path: str) -> Path:
    """The folder of one job."""
    folder, *more = folders(path)
    if more:
        raise LaunchError(f"{path} is a pipeline; name one of its jobs: {folder}, ...")
    return folder


def status_of(folder: Path) -> dict[str, Any]:
    """What is known of a job and its run, by name; also when Slurm has forgotten it.

    Args:
        folder: of the job.
    """
    facts = slurm.facts(folder)
    known = slurm.state(facts["id"])
    if not known:  # then the run's folder knows what came of it
        numbers = range(facts["array"]) if facts["array"] is not None else [""]
        known = [{"JobState": GONE, "ArrayTaskId": str(number)} for number in numbers]
    return {
        "job": facts["id"],
        "name": facts["name"],
        "folder": str(folder),
        "tasks": [_task(folder, facts, task) for task in known],
    }


def _task(folder: Path, facts: dict[str, Any], task: dict[str, str]) -> dict[str, Any]:
    number = task.get("ArrayTaskId", "")
    place = folder / number if number.isdecimal() else folder
    run = folder.parent / number if number.isdecimal() else folder.parent
    reason, nodes = (task.get(key, "(null)") for key in ("Reason", "NodeList"))
    return {
        "task": number or None,
        "state": task["JobState"],
        "reason": reason if reason not in ("(null)", "None") else None,
        "nodes": nodes if nodes != "(null)" else None,
        "time": task.get("RunTime"),
        "restarts": int(task.get("Restarts", 0)),
        "stops": _count(place / "stops"),
        "crashes": _count(place / "crashes"),
        "last_word": _last_word(place),
        **(_progress(run, facts.get("steps")) if folder.name == FOLDER else {}),
    }


def _count(path: Path) -> int:
    return int(path.read_text()) if path.is_file() else 0


def _last_word(place: Path) -> str | None:
    """How the newest start says it ended."""
    found = sorted(place.glob("outcome.*"), key=lambda path: path.stat().st_mtime)
    return found[-1].read_text(encoding="utf-8").strip() if found else None


def _progress(run: Path, steps: int | None) -> dict[str, Any]:
    """Step, losses and time left of a run, from its last line of metrics.

    Args:
        run: its folder.
        steps: of the whole run, if known.
    """
    from megatron_asvr.checkpoint.folder import RunFolder
    from megatron_asvr.train.metrics import last_values

    values = last_values(RunFolder(run).metrics, "train")
    found = {name: values[name] for name in NUMBERS if name in values}
    if steps is not None and found:
        found |= {"steps": steps, "eta_s": (steps - found["step"]) * found["step_s"]}
    return found


def run_status(args: argparse.Namespace) -> None:
    """Print what is known of a job, or of all of a pipeline."""
    found = [status_of(folder) for folder in folders(args.run_dir)]
    if args.json:
        print(json.dumps(found if len(found) > 1 else found[0], indent=1))
        return
    for status in found:
        print(f"job {status['job']} ({status['name']}) in {status['folder']}")
        for task in status["tasks"]:
            print("  " + ", ".join(_told(task)))


def _told(task: dict[str, Any]) -> Iterator[str]:
    """A task's status in words."""
    if task["task"]:
        yield f"task {task['task']}"
    yield task["state"] + (f" ({task['reason']})" if task["reason"] else "")
    if task["nodes"]:
        yield f"on {task['nodes']} for {task['time']}"
    if "step" in task:
        yield f"step {task['step']}" + (f"/{task['steps']}" if "steps" in task else "")
        yield from (f"{key} {task[key]:.4f}" for key in NUMBERS[1:4] if key in task)
    if task.get("eta_s") and task["state"] not in (*slurm.OVER, GONE):
        yield f"ETA {clock(task['eta_s'])}"
    yield f"{task['restarts']} restarts ({task['stops']} stops, {task['crashes']} crashes)"
    if task["last_word"] and task["state"] != "RUNNING":
        yield f"last word: {task['last_word']}"


def run_ls(args: argparse.Namespace) -> None:
    """Print one line a job."""
    found = sorted(Path(args.root).rglob(slurm.FACTS))
    if not found:
        raise LaunchError(f"no job was submitted from below {args.root}; name the folder of runs")
    for path in found:
        status = status_of(path.parent)
        states = sorted({task["state"] for task in status["tasks"]})
        print(f"{status['job']:>8}  {status['name']:<20}  {', '.join(states):<12}  {path.parent}")


def run_logs(args: argparse.Namespace) -> None:
    """Print the logs of a job; with ``--follow`` until it is over."""
    folder = _one(args.run_dir)
    number = slurm.facts(folder)["id"]
    read: dict[Path, int] = {}
    shown = _print_new(folder, number, read)
    while args.follow:
        over = _is_over(slurm.state(number))  # before reading: nothing is written afterwards
        shown = _print_new(folder, number, read, shown)
        if over:
            break
        time.sleep(LOOK_S)
    if not read:
        raise LaunchError(f"{folder} has no log of job {number} yet; `asvr slurm status` says why")


def _is_over(tasks: Sequence[dict[str, str]]) -> bool:
    return all(task["JobState"] in slurm.OVER for task in tasks)


def _print_new(
    folder: Path, number: str, read: dict[Path, int], shown: Path | None = None
) -> Path | None:
    """Print what logs have got since they were last read; the one whose text came last.

    Args:
        folder: of the job.
        number: of the job.
        read: bytes printed of each log; brought up to date.
        shown: the log whose text came last, for which no heading is needed.
    """
    for path in sorted([*folder.glob(f"{number}.log"), *folder.glob(f"{number}_*.log")]):
        with path.open("rb") as stream:
            stream.seek(read.get(path, 0))
            new = stream.read()
        read[path] = read.get(path, 0) + len(new)
        if new and path != shown and "_" in path.name:
            print(f"== {path.name}")
        if new:
            print(new.decode(errors="replace"), end="", flush=True)
            shown = path
    return shown


def run_cancel(args: argparse.Namespace) -> None:
    """End a job, or every job of a pipeline that is not over."""
    for folder in reversed(folders(args.run_dir)):  # none may start because another has ended
        number = slurm.facts(folder)["id"]
        if _is_over(slurm.state(number)):
            print(f"job {number} is over already")
            continue
        slurm.call("scancel", "--full", number)
        print(f"job {number} is cancelled")


def run_requeue(args: argparse.Namespace) -> None:
    """Start a job again; its restarts are counted anew."""
    folder = _one(args.run_dir)
    number = slurm.facts(folder)["id"]
    if not slurm.state(number):
        raise LaunchError(f"Slurm has forgotten job {number}; submit it again, and it continues")
    slurm.call("scontrol", "requeue", number)
    for place in (folder, *folder.glob("[0-9]*/")):
        for name in ("stops", "crashes"):
            (place / name).unlink(missing_ok=True)
    print(f"job {number} is queued again")
