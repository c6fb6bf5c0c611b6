"""Slurm, through its own commands: a job is one readable script, kept beside what it made.

Nothing here is imported by a running job; the script (``slurm/job.sh.j2``) needs bash alone.
"""

import itertools
import json
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_asvr.errors import LaunchError

RECIPES = Path(__file__).parents[1] / "recipes"
TEMPLATE = "job.sh.j2"
SCRIPT = "job.sh"
FACTS = "job.json"
_TIMEOUT_S = 60.0


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

    def srun_options(self) -> list[str]:
        """What srun gets."""
        if self.runtime != "pyxis":
            return []
        mounts = [f"--container-mounts={','.join(self.mounts)}"] if self.mounts else []
        return [f"--container-image={self.image}", *mounts]

    def prefix(self, gpus: bool) -> list[str]:
        """What comes before the command of a rank."""
        if self.runtime != "apptainer":
            return []
        binds = [word for mount in self.mounts for word in ("--bind", mount)]
        return ["apptainer", "exec", *(["--nv"] if gpus else []), *binds, self.image]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One job, ready to be written down.

    Attributes:
        name: shown by squeue.
        purpose: one line for a reader of the script.
        command: of every rank; ``$job/`` begins a path in the folder (of an array's task).
        folder: of the script, logs and counts of restarts; on storage that all nodes share.
        resources: what it asks for.
        container: None: the nodes' own Python.
        array: number of tasks of an array; None: no array.
        after: ids of jobs that must have succeeded before.
        max_stops: how often it may be requeued after it was told to stop.
        max_crashes: how often after it died, from its last checkpoint on.
        usable: numbers of nodes that it can use when it gets others; empty: whatever it gets.
        environment: variables of the step.
    """

    name: str
    purpose: str
    command: Sequence[str]
    folder: Path
    resources: Resources
    container: Container | None = None
    array: int | None = None
    after: tuple[str, ...] = ()
    max_stops: int = 1000
    max_crashes: int = 3
    usable: tuple[int, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def render(job: Job) -> str:
    """The script of a job."""
    import jinja2

    loader = jinja2.FileSystemLoader(RECIPES)
    made = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",  # bash has ${#array[@]}
    )
    wraps = job.container.prefix(job.resources.gpus_per_node > 0) if job.container else []
    srun = job.container.srun_options() if job.container else []
    return made.get_template(TEMPLATE).render(
        options=_options(job),
        purpose=job.purpose,
        folder=shlex.quote(str(job.folder)),
        array=job.array is not None,
        ranks_a_node=job.resources.ranks_a_node,
        usable=_sequence(job.usable),
        max_stops=job.max_stops,
        max_crashes=job.max_crashes,
        environment=[(name, shlex.quote(value)) for name, value in job.environment.items()],
        srun="".join(f" {shlex.quote(option)}" for option in srun),
        command=_shell([*wraps, *job.command]),
    )


def _options(job: Job) -> list[str]:
    """Options of sbatch, as its comment lines take them."""
    wants, log = job.resources, "%A_%a.log" if job.array is not None else "%j.log"
    options = [
        f"job-name={job.name}",
        f"nodes={wants.nodes}"
        if wants.min_nodes is None
        else f"nodes={wants.min_nodes}-{wants.nodes}",
        f"ntasks-per-node={wants.ranks_a_node}",
        f"cpus-per-task={wants.cpus_per_rank}",
    ]
    if wants.gpus_per_node:
        options.append(f"gpus-per-node={wants.gpus_per_node}")
    asked = {name: getattr(wants, name) for name in ("time", "partition", "account")}
    options += [f"{name}={value}" for name, value in asked.items() if value is not None]
    if job.array is not None:
        options.append(f"array=0-{job.array - 1}")
    if job.after:
        options += [f"dependency=afterok:{':'.join(job.after)}", "kill-on-invalid-dep=yes"]
    options += [
        f"output={job.folder}/{log}",
        "open-mode=append",
        "requeue",
        f"signal=B:USR1@{wants.warning_s}",
    ]
    return [*options, *wants.more]


def _shell(command: Sequence[str]) -> str:
    """A command for the script; a path in ``$job`` stays one."""
    return " ".join(
        f'"{word}"' if word.startswith("$job/") else shlex.quote(word) for word in command
    )


def _sequence(numbers: Sequence[int]) -> str:
    """Ascending numbers as words of bash: one by one, or ``{first..last..step}``."""
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1:
        return f"{{{numbers[0]}..{numbers[-1]}..{steps.pop()}}}"
    return " ".join(str(number) for number in numbers)


def call(*command: str, script: str | None = None) -> str:
    """What one of Slurm's commands prints.

    Args:
        command: its words.
        script: standard input.

    Raises:
        LaunchError: there is no Slurm here, it refuses, or does not answer.
    """
    if shutil.which(command[0]) is None:
        raise LaunchError(
            f"{command[0]} is not on this machine's PATH; call this on a login node of the cluster"
        )
    try:
        done = subprocess.run(
            command,
            input=script or "",
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{shlex.join(command)} has not answered for {_TIMEOUT_S:.0f} s; `scontrol ping` tells "
            "whether the controller is up"
        ) from None
    if done.returncode:
        raise LaunchError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def check(script: str) -> str:
    """When and where Slurm would start a script.

    Raises:
        LaunchError: it would refuse it.
    """
    if shutil.which("sbatch") is None:
        call("sbatch")
    done = subprocess.run(
        ["sbatch", "--test-only"],
        input=script,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    said = done.stderr.strip()
    if done.returncode:
        raise LaunchError(f"sbatch --test-only refuses this job: {said}")
    return said


def submit(job: Job, script: str) -> str:
    """The id of a job, after its script was written to its folder and submitted.

    Raises:
        LaunchError: Slurm refuses it.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder / SCRIPT
    path.write_text(script, encoding="utf-8")
    number = call("sbatch", "--parsable", str(path)).strip().partition(";")[0]
    facts = {"id": number, "name": job.name, "command": list(job.command), "array": job.array}
    (job.folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return number


def state(number: str) -> list[dict[str, str]]:
    """What Slurm knows of a job, one entry an array task; empty when it has forgotten it."""
    try:
        printed = call("scontrol", "--oneliner", "show", "job", number)
    except LaunchError as err:
        if "Invalid job id" in str(err):
            return []
        raise
    return [_fields(line) for line in printed.splitlines() if line.strip()]


def _fields(line: str) -> dict[str, str]:
    """``Key=value`` words; a value may hold an equals sign, and spaces in a few last fields."""
    pairs = (word.partition("=") for word in line.split())
    return {key: value for key, mark, value in pairs if mark}


def facts(folder: Path) -> dict[str, Any]:
    """What was submitted from a folder.

    Raises:
        LaunchError: nothing was.
    """
    path = folder / FACTS
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise LaunchError(
            f"{path} cannot be read ({err}); `asvr slurm submit` has submitted nothing from there"
        ) from None
