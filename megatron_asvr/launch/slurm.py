"""Slurm, through its own commands; what was submitted is kept beside what it makes."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_asvr.errors import LaunchError
from megatron_asvr.launch.script import Job

SCRIPT = "job.sh"
FACTS = "job.json"
# States that a job leaves only when a person requeues it.
OVER = frozenset(
    ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")
).union(("PREEMPTED", "BOOT_FAIL"))
_TIMEOUT_S = 60.0


def call(*command: str) -> str:
    """What one of Slurm's commands prints.

    Args:
        command: its words.

    Raises:
        LaunchError: there is no Slurm here, it refuses, or does not answer.
    """
    done = _run(*command)
    if done.returncode:
        raise LaunchError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def _run(*command: str, script: str = "") -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise LaunchError(
            f"{command[0]} is not on this machine's PATH; call this on a login node of the cluster"
        )
    try:
        return subprocess.run(
            command, input=script, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{shlex.join(command)} has not answered for {_TIMEOUT_S:.0f} s; `scontrol ping` tells "
            "whether the controller is up"
        ) from None


def check(script: str) -> str:
    """When and where Slurm would start a script.

    Raises:
        LaunchError: it would refuse it.
    """
    done = _run("sbatch", "--test-only", script=script)
    said = done.stderr.strip()
    if done.returncode:
        raise LaunchError(f"sbatch --test-only refuses this job: {said}")
    return said


def submit(job: Job, script: str, more: Mapping[str, Any] | None = None) -> str:
    """The id of a job, after its script was written to its folder and submitted.

    Args:
        job: what to submit.
        script: of it.
        more: facts to keep beside the script, for whoever looks after the job.

    Raises:
        LaunchError: Slurm refuses it.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder / SCRIPT
    path.write_text(script, encoding="utf-8")
    number = call("sbatch", "--parsable", str(path)).strip().partition(";")[0]
    facts = {"id": number, "name": job.name, "command": list(job.command), "array": job.array}
    text = json.dumps(facts | dict(more or {}), indent=1)
    (job.folder / FACTS).write_text(text + "\n", encoding="utf-8")
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
