"""A job of Slurm as one readable script, made from ``slurm/job.sh.j2``.

Nothing here is imported by a running job; the script needs bash alone.
"""

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_asvr.errors import LaunchError

RECIPES = Path(__file__).parents[1] / "recipes"
TEMPLATE = "job.sh.j2"
CONFIG = "$job/config.yaml"  # in a command: the resolved configuration, of an array's task its own

_PLAIN = re.compile(r"[\w@%+=:,./-]*", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)


def time_s(text: str) -> int | None:
    """Seconds of a time limit in one of Slurm's forms; None for any other text: Slurm judges it."""
    found = _TIME.fullmatch(text)
    if found is None:
        return None
    days, *parts = found.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None and len(numbers) < 3:  # minutes, or minutes:seconds
        numbers = [0, *numbers]
    hours, minutes, seconds = (*numbers, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What a job asks Slurm for.

    Attributes:
        nodes: number of nodes, or the largest.
        min_nodes: the smallest number that the job may get, also when it is requeued; None: all.
        gpus_per_node: 0 on nodes without GPUs.
        ranks_per_node: processes on each node; default: one a GPU, or one.
        cpus_per_rank: CPUs of each rank.
        time: limit, in any of Slurm's forms; None: the partition's.
        partition: None: Slurm's default.
        account: None: the user's default.
        warning_s: seconds before the time limit at which the ranks are told to save and stop.
        more: further options of sbatch, such as ``constraint=h100``.
    """

    nodes: int = 1
    min_nodes: int | None = None
    gpus_per_node: int = 0
    ranks_per_node: int | None = None
    cpus_per_rank: int = 1
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    warning_s: int = 180
    more: tuple[str, ...] = ()

    @property
    def ranks_a_node(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.ranks_a_node


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """An image that the step runs in; the script itself runs on the node.

    Attributes:
        image: as the runtime names it.
        runtime: "pyxis" (options of srun) or "apptainer" (a command before ours).
        mounts: ``SOURCE:TARGET`` pairs.
    """

    image: str
    runtime: str = "pyxis"
    mounts: tuple[str, ...] = ()

    def srun_options(self, workdir: Path) -> list[str]:
        """What srun gets."""
        if self.runtime != "pyxis":
            return []
        mounts = [f"--container-mounts={','.join(self.mounts)}"] if self.mounts else []
        return [f"--container-image={self.image}", *mounts, f"--container-workdir={workdir}"]

    def prefix(self, workdir: Path, *, gpus: bool) -> list[str]:
        """What comes before the command of a rank."""
        if self.runtime != "apptainer":
            return []
        binds = [word for mount in self.mounts for word in ("--bind", mount)]
        options = [*(["--nv"] if gpus else []), *binds, "--pwd", str(workdir)]
        return ["apptainer", "exec", *options, self.image]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One job, ready to be written down.

    Attributes:
        name: shown by squeue.
        purpose: one line for a reader of the script.
        command: of every rank; ``CONFIG`` stands for the job's own configuration.
        folder: of the script, logs and counts of restarts; on storage that all nodes share.
        workdir: what relative paths are relative to.
        resources: what it asks for.
        container: None: the nodes' own Python.
        array: number of tasks of an array; None: no array.
        after: ids of jobs that must have succeeded before.
        max_stops: how often it may be requeued after it was told to stop.
        max_crashes: how often after it died, from its last checkpoint on.
        usable: numbers of nodes that it can use when it gets others; empty: whatever it gets.
        preflight: command of a step before, on the same ranks; empty: none.
        environment: variables of the steps.
    """

    name: str
    purpose: str
    command: Sequence[str]
    folder: Path
    workdir: Path
    resources: Resources
    container: Container | None = None
    array: int | None = None
    after: tuple[str, ...] = ()
    max_stops: int = 1000
    max_crashes: int = 3
    usable: tuple[int, ...] = ()
    preflight: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def render(job: Job) -> str:
    """The script of a job.

    Raises:
        LaunchError: a value cannot stand in a script.
    """
    import jinja2

    if "\\" in str(job.folder):
        raise LaunchError(f"{job.folder}: sbatch takes no backslash in a path; use another folder")
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(RECIPES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",  # bash has ${#array[@]}
    )
    wraps, srun = [], [f"--cpus-per-task={job.resources.cpus_per_rank}"]  # not inherited: 22.05
    if job.container is not None:
        wraps = job.container.prefix(job.workdir, gpus=job.resources.gpus_per_node > 0)
        srun += job.container.srun_options(job.workdir)
    return made.get_template(TEMPLATE).render(
        options=[_option(text) for text in _options(job)],
        purpose=" ".join(job.purpose.split()),
        folder=shlex.quote(str(job.folder)),
        array=job.array is not None,
        ranks_a_node=job.resources.ranks_a_node,
        usable=_sequence(job.usable),
        max_stops=job.max_stops,
        max_crashes=job.max_crashes,
        environment=[(_name(name), shlex.quote(v)) for name, v in job.environment.items()],
        srun="".join(f" {shlex.quote(option)}" for option in srun),
        preflight=_shell([*wraps, *job.preflight]) if job.preflight else "",
        command=_shell([*wraps, *job.command]),
    )


def _options(job: Job) -> list[str]:
    """Options of sbatch, ``name=value``."""
    wants, log = job.resources, "%A_%a.log" if job.array is not None else "%j.log"
    options = [f"job-name={job.name}"]
    if wants.min_nodes is None:
        options += [f"nodes={wants.nodes}", f"ntasks-per-node={wants.ranks_a_node}"]
        options.append(f"cpus-per-task={wants.cpus_per_rank}")
    else:  # given tasks, Slurm takes no more nodes than the smallest number needs
        options.append(f"nodes={wants.min_nodes}-{wants.nodes}")
        options.append(f"mincpus={wants.ranks_a_node * wants.cpus_per_rank}")
    if wants.gpus_per_node:
        options.append(f"gpus-per-node={wants.gpus_per_node}")
    asked = {name: getattr(wants, name) for name in ("time", "partition", "account")}
    options += [f"{name}={value}" for name, value in asked.items() if value is not None]
    if job.array is not None:
        options.append(f"array=0-{job.array - 1}")
    if job.after:
        options += [f"dependency=afterok:{':'.join(job.after)}", "kill-on-invalid-dep=yes"]
    options += [
        f"chdir={job.workdir}",
        f"output={str(job.folder).replace('%', '%%')}/{log}",
        "open-mode=append",
        "requeue",
        f"signal=B:USR1@{wants.warning_s}",
    ]
    return [*options, *wants.more]


def _option(text: str) -> str:
    """An option as a comment line of sbatch takes it: in quotes where it holds more than words."""
    name, mark, value = text.partition("=")
    if "\n" in text or not _PLAIN.fullmatch(name):
        raise LaunchError(f"{text!r} is no option of sbatch; wanted NAME=VALUE on one line")
    if not _PLAIN.fullmatch(value):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"{name}{mark}{value}"


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise LaunchError(f"{text!r} is no name of an environment variable")
    return text


def _shell(command: Sequence[str]) -> str:
    """A command for the script; the job's own folder is filled in there."""
    return " ".join(f'"{word}"' if word == CONFIG else shlex.quote(word) for word in command)


def _sequence(numbers: Sequence[int]) -> str:
    """Ascending numbers as words of bash: one by one, or ``{first..last..step}``."""
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1:
        return f"{{{numbers[0]}..{numbers[-1]}..{steps.pop()}}}"
    return " ".join(str(number) for number in numbers)
