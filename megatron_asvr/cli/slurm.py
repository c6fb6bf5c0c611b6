"""`asvr slurm`: run any command of ours as a job of Slurm, and look after it."""

import argparse
import dataclasses
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_asvr.cli.common import plan_lines, positive
from megatron_asvr.config.check import check
from megatron_asvr.config.load import load
from megatron_asvr.config.load import save as save_config
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import ConfigError, LaunchError
from megatron_asvr.launch import slurm
from megatron_asvr.launch.elastic import most_nodes, start_nodes, usable_nodes
from megatron_asvr.launch.script import CONFIG, Container, Job, Resources, render

RESOURCES = ("gpus_per_node", "ranks_per_node", "cpus_per_rank", "time", "partition", "warning_s")
FOLDER = "slurm"  # of a run's job, in the run's folder


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("slurm", help="submit jobs to Slurm and look after them")
    parser.set_defaults(takes_overrides=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_submit(actions.add_parser("submit", help="check everything, write a script, submit it"))
    for name, run, text in (
        ("status", run_status, "state, step, losses and restarts of a job"),
        ("logs", run_logs, "print what a job has printed"),
        ("cancel", run_cancel, "end a job"),
        ("requeue", run_requeue, "start a job again, from its newest checkpoint"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("run_dir", metavar="RUN", help="run folder, or the folder of a job")
        action.set_defaults(run=run)
        if name == "status":
            action.add_argument("--json", action="store_true", help="print it as JSON")
    listing = actions.add_parser("ls", help="all jobs whose folders lie below a folder")
    listing.add_argument("root", nargs="?", default="runs")
    listing.set_defaults(run=run_ls)


def _add_submit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        nargs="+",
        metavar="CONFIG|COMMAND",
        help="configuration of a run to train, with settings; or -- and any command of asvr",
    )
    parser.add_argument(
        "--nodes",
        type=node_range,
        default=(None, 1),
        metavar="N|MIN-MAX",
        help="a range: the run goes on with what it gets when it is requeued",
    )
    parser.add_argument("--gpus-per-node", type=int, default=0)
    parser.add_argument("--ranks-per-node", type=positive, help="default: one a GPU, else one")
    parser.add_argument("--cpus-per-rank", type=positive, default=1)
    parser.add_argument("--time", help="limit, as Slurm writes it: 4:00:00, 2-00:00:00")
    parser.add_argument(
        "--warning",
        dest="warning_s",
        type=positive,
        default=Resources().warning_s,
        metavar="SECONDS",
        help="of the ranks before the time limit, to save in (default: %(default)s)",
    )
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="NAME=VALUE", help="further options"
    )
    parser.add_argument("--name", help="of the job (default: the run folder's)")
    parser.add_argument("--after", action="append", default=[], metavar="JOB", help="runs after it")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="a.b=1,2",
        help="an array of runs, one for each value; several: all combinations",
    )
    parser.add_argument("--container", metavar="IMAGE", help="image that the ranks run in")
    parser.add_argument("--container-runtime", choices=("pyxis", "apptainer"), default="pyxis")
    parser.add_argument("--mount", action="append", default=[], metavar="SOURCE:TARGET")
    parser.add_argument("--job-dir", help="for a command: where script and logs go")
    parser.add_argument("--max-stops", type=int, default=1000, help="restarts after saving")
    parser.add_argument("--max-crashes", type=int, default=3, help="restarts after a crash")
    parser.add_argument("--dry-run", action="store_true", help="check and print, submit nothing")
    parser.set_defaults(run=run_submit, takes_overrides=True)


def node_range(text: str) -> tuple[int | None, int]:
    """Smallest (None when there is but one) and largest number of nodes, for argparse."""
    low, mark, high = text.partition("-")
    least, most = positive(low), positive(high if mark else low)
    if least > most:
        raise ValueError(text)
    return (least if mark else None), most


node_range.__name__ = "number of nodes, or MIN-MAX"


def run_submit(args: argparse.Namespace) -> None:
    """Check, write and submit one job."""
    resources = Resources(
        **{name: getattr(args, name) for name in RESOURCES},
        min_nodes=args.nodes[0],
        nodes=args.nodes[1],
        account=args.account,
        more=tuple(args.sbatch),
    )
    if args.what[0] in _commands():
        job = _command_job(args, resources)
    else:
        job = _training_job(args, resources)
    script = render(job)
    if args.dry_run:
        print(script, end="")
        return
    print(slurm.check(script), file=sys.stderr)
    number = slurm.submit(job, script)
    print(f"job {number}: {job.folder / slurm.SCRIPT}")


def _commands() -> set[str]:
    from megatron_asvr.cli.main import COMMANDS

    return {module.__name__.rpartition(".")[2].replace("evaluate", "eval") for module in COMMANDS}


def _command_job(args: argparse.Namespace, resources: Resources) -> Job:
    from megatron_asvr.cli.main import parse

    if args.sweep:
        raise LaunchError("--sweep is for a run's configuration, not for a command")
    if args.job_dir is None:
        raise LaunchError(f"`{args.what[0]}` needs --job-dir, a folder for its script and logs")
    words = [*args.what, *args.overrides]
    parse(words)
    return _job(args, resources, words, Path(args.job_dir), name=args.name or args.what[0])


def _training_job(args: argparse.Namespace, resources: Resources) -> Job:
    source, *overrides = [*args.what, *args.overrides]
    runs = list(_sweep(args.sweep))
    config = load(source, overrides)
    root = Path(config.run.dir).absolute()
    folder = root / FOLDER
    usable = set(usable_nodes(config, resources.ranks_a_node))
    for number, values in enumerate(runs):
        place = root / str(number) if args.sweep else root
        one = load(source, [*overrides, *values, f"run.dir={place}"])
        usable &= set(_check_run(one, resources))
        if not args.dry_run:
            task = folder / str(number) if args.sweep else folder
            save_config(one, task / "config.yaml")
    words = ["train", CONFIG]
    made = _job(args, resources, words, folder, name=args.name or root.name)
    made = dataclasses.replace(made, usable=tuple(sorted(usable)))
    return dataclasses.replace(made, array=len(runs)) if args.sweep else made


def _job(
    args: argparse.Namespace,
    resources: Resources,
    words: Sequence[str],
    folder: Path,
    *,
    name: str,
) -> Job:
    container = None
    if args.container is not None:
        container = Container(
            image=args.container, runtime=args.container_runtime, mounts=tuple(args.mount)
        )
    python = "python" if container is not None else sys.executable
    return Job(
        name=name,
        purpose=f"asvr {shlex.join(words)}",
        command=[python, "-m", "megatron_asvr.cli.main", *words],
        folder=folder.absolute(),
        workdir=Path.cwd(),
        resources=resources,
        container=container,
        after=tuple(args.after),
        max_stops=args.max_stops,
        max_crashes=args.max_crashes,
        environment={"PYTHONUNBUFFERED": "1"},
    )


def _sweep(settings: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Settings of every run of a sweep; one run without any when there is none."""
    axes = []
    for text in settings:
        name, mark, values = text.partition("=")
        if not mark or not values:
            raise ConfigError(f"--sweep {text!r}: wanted a setting and its values, a.b=1,2")
        axes.append([f"{name}={value}" for value in values.split(",")])
    return itertools.product(*axes)


def _check_run(config: Config, resources: Resources) -> tuple[int, ...]:
    """Numbers of nodes that a run can use, when it can start on these resources.

    Raises:
        ConfigError: a setting cannot work; more ranks than one global batch has samples.
        DataError: the data cannot be used.
    """
    usable = usable_nodes(config, resources.ranks_a_node)
    if resources.min_nodes is not None:
        used = start_nodes(usable, resources.min_nodes, resources.nodes)
        if used < resources.nodes:
            print(f"{used} of {resources.nodes} nodes will be used", file=sys.stderr)
        resources = dataclasses.replace(resources, nodes=used)
    p, t = config.parallel, config.train
    replica = p.tp * p.pp * p.cp
    dp = resources.world // replica
    if dp * t.micro_batch > t.global_batch:
        batch, most = dp * t.micro_batch, most_nodes(config, resources.ranks_a_node)
        raise ConfigError(
            f"{resources.nodes} nodes x {resources.ranks_a_node} ranks are {dp} data-parallel "
            f"replicas of micro-batch {t.micro_batch}, but train.global_batch={t.global_batch}; at "
            f"most {most} nodes have work. Or take a larger batch: "
            f"train.global_batch={batch} train.optim.lr={t.optim.lr * batch / t.global_batch:g} "
            "(the learning rate grows with the batch; check that it still trains)"
        )
    check(config, resources.world)
    for line in plan_lines(config, resources.world):
        if line.startswith(("layout", "data", "imbalance")):
            print(line, file=sys.stderr)
    if p.tp > resources.ranks_a_node:
        print(
            f"warning: parallel.tp={p.tp} crosses nodes of {resources.ranks_a_node} ranks; its "
            "collectives are in every layer and belong inside one node",
            file=sys.stderr,
        )
    return usable


def _folder(path: str) -> Path:
    """The folder of a job, given it or its run's."""
    inside = Path(path) / FOLDER
    return inside if (inside / slurm.FACTS).is_file() else Path(path)


def status_of(folder: Path) -> dict[str, Any]:
    """What is known of a job and its run, by name.

    Args:
        folder: of the job.
    """
    facts = slurm.facts(folder)
    tasks = []
    for task in slurm.state(facts["id"]) or [{}]:
        number = task.get("ArrayTaskId", "")
        place = folder / number if number.isdecimal() else folder
        run = folder.parent / number if number.isdecimal() else folder.parent
        tasks.append(
            {
                "task": number or None,
                "state": task.get("JobState", "unknown to Slurm (long over)"),
                "reason": task.get("Reason"),
                "nodes": task.get("NodeList"),
                "time": task.get("RunTime"),
                "restarts": int(task.get("Restarts", 0)),
                "stops": _count(place / "stops"),
                "crashes": _count(place / "crashes"),
                **_progress(run),
            }
        )
    return {"job": facts["id"], "name": facts["name"], "folder": str(folder), "tasks": tasks}


def _count(path: Path) -> int:
    return int(path.read_text()) if path.is_file() else 0


def _progress(run: Path) -> dict[str, Any]:
    """Step and losses of a run, from its last line of metrics."""
    from megatron_asvr.checkpoint.folder import RunFolder
    from megatron_asvr.train.metrics import last_values

    metrics = RunFolder(run).metrics
    values = last_values(metrics, "train") if metrics.is_file() else {}
    wanted = ("step", "loss", "text_loss", "visual_loss", "step_s")
    return {name: values[name] for name in wanted if name in values}


def run_status(args: argparse.Namespace) -> None:
    """Print what is known of a job."""
    status = status_of(_folder(args.run_dir))
    if args.json:
        print(json.dumps(status, indent=1))
        return
    print(f"job {status['job']} ({status['name']}) in {status['folder']}")
    for task in status["tasks"]:
        told = (
            f"{key} {value}" for key, value in task.items() if value not in (None, "", "(null)")
        )
        print("  " + ", ".join(told))


def run_ls(args: argparse.Namespace) -> None:
    """Print one line a job."""
    for path in sorted(Path(args.root).rglob(slurm.FACTS)):
        status = status_of(path.parent)
        states = sorted({task["state"] for task in status["tasks"]})
        print(f"{status['job']:>8}  {status['name']:<20}  {', '.join(states):<12}  {path.parent}")


def run_logs(args: argparse.Namespace) -> None:
    """Print the logs of a job."""
    folder = _folder(args.run_dir)
    number = slurm.facts(folder)["id"]
    logs = sorted(folder.glob(f"{number}*.log"))
    if not logs:
        raise LaunchError(f"{folder} has no log of job {number} yet")
    for path in logs:
        if len(logs) > 1:
            print(f"== {path.name}")
        print(path.read_text(encoding="utf-8", errors="replace"), end="")


def run_cancel(args: argparse.Namespace) -> None:
    """End a job."""
    number = slurm.facts(_folder(args.run_dir))["id"]
    slurm.call("scancel", "--full", number)
    print(f"job {number} is cancelled")


def run_requeue(args: argparse.Namespace) -> None:
    """Start a job again."""
    number = slurm.facts(_folder(args.run_dir))["id"]
    slurm.call("scontrol", "requeue", number)
    print(f"job {number} is queued again")
