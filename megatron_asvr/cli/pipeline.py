"""`asvr slurm pipeline`: jobs that wait for one another, from one file.

    dir: runs/llava                  # scripts and logs of what is no run; default: runs/FILE
    defaults: {partition: gpu}       # options of `asvr slurm submit`
    steps:
      index: {command: data index stage1.yaml, cpus-per-rank: 16}
      stage1: {command: train stage1.yaml, nodes: 2, gpus-per-node: 8}
      check: {command: eval runs/stage1 --data test.json, after: [stage1]}

A step comes after the one before it, unless ``after`` names others; ``after: []`` is none.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_asvr.cli import submit
from megatron_asvr.cli.planned import Planned, plan
from megatron_asvr.errors import ConfigError, LaunchError
from megatron_asvr.launch import slurm
from megatron_asvr.launch.script import render

STEPS = "pipeline.json"
KEYS = ("dir", "defaults", "steps")


def add(parser: argparse.ArgumentParser) -> None:
    """Register the arguments."""
    parser.add_argument("file", metavar="CONFIG", help="YAML file with named steps")
    parser.add_argument(
        "--dry-run", action="store_true", help="check all, print plans and scripts, submit nothing"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check every step, then submit them all, or none."""
    folder, steps, after = read(args.file)
    made: dict[str, str] = {}
    planned: dict[str, Planned] = {}
    for name, step in steps.items():
        planned[name] = plan(step, made)
        made |= dict.fromkeys(planned[name].makes, name)
        submit.show(planned[name])
        print(f"  after: {', '.join(after[name]) or 'nothing'}", file=sys.stderr)
        if args.dry_run:
            print(f"# == {name}: {planned[name].job.folder / slurm.SCRIPT}")
            print(render(planned[name].job), end="")
    submit.require_inputs({name: step.lacks for name, step in planned.items()})
    if args.dry_run:
        return
    for step in planned.values():
        submit.require_idle(step.job)
        slurm.check(render(step.job))
    _submit(folder, planned, after)


def _submit(folder: Path, planned: Mapping[str, Planned], after: Mapping[str, list[str]]) -> None:
    numbers: dict[str, str] = {}
    places = {name: str(step.job.folder) for name, step in planned.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STEPS).write_text(json.dumps(places, indent=1) + "\n", encoding="utf-8")
    except OSError as err:
        raise LaunchError(f"{folder} cannot be written: {err}; `dir:` names another") from None
    try:
        for name, step in planned.items():
            numbers[name] = submit.submit(step, tuple(numbers[other] for other in after[name]))
            print(f"job {numbers[name]}: {name}: {step.job.folder / slurm.SCRIPT}")
    except LaunchError:
        if numbers:
            slurm.call("scancel", *numbers.values())
            print(f"cancelled again: {', '.join(numbers)}", file=sys.stderr)
        raise


def read(file: str) -> tuple[Path, dict[str, argparse.Namespace], dict[str, list[str]]]:
    """The folder of a pipeline, the arguments of every step, and what each comes after.

    Raises:
        ConfigError: the file is wrong.
    """
    try:
        tree = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as err:
        raise ConfigError(f"{file} is no pipeline: {err}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("steps"), dict) or not tree["steps"]:
        raise ConfigError(f"{file} is no pipeline: wanted `steps:` with a name for each")
    if unknown := set(tree) - set(KEYS):
        raise ConfigError(f"{file}: {min(unknown)!r} is unknown; allowed: {', '.join(KEYS)}")
    folder = Path(tree.get("dir") or Path("runs") / Path(file).stem)
    steps: dict[str, argparse.Namespace] = {}
    after: dict[str, list[str]] = {}
    for name, step in tree["steps"].items():
        if not isinstance(step, dict) or not step.get("command"):
            raise ConfigError(f"{file}: step {name!r} has no `command:`")
        options = {"name": name, "job-dir": str(folder / name), **(tree.get("defaults") or {})}
        options |= {key: value for key, value in step.items() if key not in ("command", "after")}
        after[name] = step.get("after", list(steps)[-1:])
        if not isinstance(after[name], list):
            raise ConfigError(f"{file}: step {name!r}: `after:` takes a list of names in brackets")
        if wrong := [other for other in after[name] if other not in steps]:
            raise ConfigError(
                f"{file}: step {name!r} comes after {wrong[0]!r}, which is no step above it"
            )
        steps[name] = _arguments(options, step["command"])
    return folder, steps, after


def _arguments(options: Mapping[str, Any], command: str | list[str]) -> argparse.Namespace:
    """Arguments of `asvr slurm submit`, as its own parser reads them."""
    from megatron_asvr.cli.main import parse

    if not isinstance(options.get("time", ""), str):  # YAML takes 1:00:00 for a number
        raise ConfigError(f'time: {options["time"]} is a number; quote it, as in time: "4:00:00"')
    words = []
    for key, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{key}"] if one is True else [f"--{key}={one}"]
    commanded = shlex.split(command) if isinstance(command, str) else [str(w) for w in command]
    return parse(["slurm", "submit", *words, "--", *commanded])
