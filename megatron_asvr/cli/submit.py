"""`asvr slurm submit`: everything is checked before anything is handed to Slurm."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_asvr.cli.common import natural, positive
from megatron_asvr.cli.planned import FOLDER, Planned, plan
from megatron_asvr.config.load import save as save_config
from megatron_asvr.errors import ConfigError, LaunchError
from megatron_asvr.launch import slurm
from megatron_asvr.launch.script import Job, Resources, render


def add(parser: argparse.ArgumentParser) -> None:
    """Register the arguments."""
    parser.add_argument(
        "what",
        nargs="+",
        metavar="CONFIG|COMMAND",
        help="configuration of a run to train, with settings; or -- and any command of asvr",
    )
    _add_resources(parser)
    parser.add_argument("--name", help="of the job (default: the run folder's)")
    parser.add_argument(
        "--after", action="append", default=[], metavar="JOB|RUN", help="start when it succeeded"
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="a.b=1,2",
        help="an array of runs, one for each value; several: all combinations",
    )
    parser.add_argument("--container", metavar="IMAGE", help="image that the ranks run in")
    parser.add_argument("--container-runtime", choices=("pyxis", "apptainer"), default="pyxis")
    parser.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="SOURCE:TARGET",
        help="further folders of the container, beside the working directory, the run's and those "
        "that the configuration names",
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="variables of the ranks"
    )
    parser.add_argument("--job-dir", help="for a command: where script and logs go")
    parser.add_argument("--max-stops", type=positive, default=1000, help="restarts after saving")
    parser.add_argument("--max-crashes", type=natural, default=3, help="restarts after a crash")
    parser.add_argument(
        "--no-preflight", action="store_true", help="do not look at the nodes before a run starts"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check, print plan and script, submit nothing"
    )
    parser.set_defaults(run=run, takes_overrides=True)


def _add_resources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nodes",
        type=node_range,
        default=(None, 1),
        metavar="N|MIN-MAX",
        help="a range: the run goes on with what it gets when it is requeued",
    )
    parser.add_argument("--gpus-per-node", type=natural, default=0)
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


def node_range(text: str) -> tuple[int | None, int]:
    """Smallest (None when there is but one) and largest number of nodes, for argparse."""
    low, mark, high = text.partition("-")
    least, most = positive(low), positive(high if mark else low)
    if least > most:
        raise ValueError(text)
    return (least if mark else None), most


node_range.__name__ = "number of nodes, or MIN-MAX"


def run(args: argparse.Namespace) -> None:
    """Check, write and submit one job."""
    after = [_earlier(text) for text in args.after]
    planned = plan(args, {path: f"job {number}" for number, made in after for path in made})
    show(planned)
    if args.dry_run:
        print(render(planned.job), end="")
    require_inputs({planned.job.name: planned.lacks})
    if args.dry_run:
        return
    require_known(after)
    require_idle(planned.job)
    print(slurm.check(render(planned.job)), file=sys.stderr)
    number = submit(planned, tuple(number for number, _ in after))
    print(f"job {number}: {planned.job.folder / slurm.SCRIPT}")


def _earlier(text: str) -> tuple[str, Sequence[str]]:
    """Number of a job named by ``--after``, and what it makes; a bare number may make anything."""
    if text.isdecimal():
        return text, ["/"]
    facts = slurm.facts(job_folder(text))
    return facts["id"], facts["makes"]


def job_folder(path: str) -> Path:
    """The folder of a job, given it or its run's."""
    inside = Path(path) / FOLDER
    return inside if (inside / slurm.FACTS).is_file() else Path(path)


def show(planned: Planned) -> None:
    """Tell what was found."""
    print(f"{planned.job.name}: {planned.job.purpose}", file=sys.stderr)
    for line in planned.notes:
        print(f"  {line}", file=sys.stderr)


def require_inputs(lacks: Mapping[str, Mapping[str, str]]) -> None:
    """Return when nothing is missing.

    Args:
        lacks: paths that are missing, by what names them, by job.

    Raises:
        ConfigError: naming all of them.
    """
    lines = [
        f"{job}: {name}={path}" for job, paths in lacks.items() for name, path in paths.items()
    ]
    if lines:
        raise ConfigError(
            f"{len(lines)} inputs are not there and no job before makes them:\n  "
            + "\n  ".join(lines)
        )


def require_known(after: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Return when Slurm will wait for every earlier job; for one it does not know it would not.

    Args:
        after: number of each job, and what it makes.

    Raises:
        LaunchError: one is unknown to Slurm, or it does not answer.
    """
    for number, _ in after:
        if not slurm.state(number):
            raise LaunchError(
                f"--after: Slurm knows no job {number} (any more), so nothing would be waited for; "
                "leave it out when what that job makes is there"
            )


def require_idle(job: Job) -> None:
    """Return when no job of the same folder is waiting or at work.

    Raises:
        LaunchError: there is one, or Slurm does not answer.
    """
    if not (job.folder / slurm.FACTS).is_file():
        return
    number = slurm.facts(job.folder)["id"]
    live = {task["JobState"] for task in slurm.state(number)} - slurm.OVER
    if live:
        raise LaunchError(
            f"job {number} of {job.folder} is {', '.join(sorted(live))}; cancel it first "
            f"(asvr slurm cancel {shlex.quote(str(job.folder))}), or leave it to go on"
        )


def clear(folder: Path) -> None:
    """Remove what an earlier submission left of settings and broken nodes; logs stay.

    Args:
        folder: of the job; tasks of an array have folders in it.
    """
    for place in [folder, *folder.glob("[0-9]*/")]:
        for name in ("exclude", "config.yaml"):
            (place / name).unlink(missing_ok=True)


def submit(planned: Planned, after: tuple[str, ...]) -> str:
    """The number of a job that was checked, after its files were written and it was submitted.

    Args:
        planned: the job.
        after: numbers of the jobs that must succeed before.
    """
    job = dataclasses.replace(planned.job, after=after)
    more = {"steps": planned.steps, "makes": [str(Path(path).absolute()) for path in planned.makes]}
    try:
        clear(job.folder)
        for path, config in planned.configs.items():
            save_config(config, path)
        return slurm.submit(job, render(job), more)
    except OSError as err:
        raise LaunchError(
            f"{job.folder} cannot be written: {err}; run.dir or --job-dir names another folder"
        ) from None
