"""`asvr gpu-smoke`: what only GPUs do, probed part by part."""

import argparse
import dataclasses
import datetime
import json
import os
import socket
import sys
from pathlib import Path

from megatron_asvr.cli.common import positive
from megatron_asvr.config.load import load
from megatron_asvr.errors import LaunchError


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("gpu-smoke", help="probe everything that only GPUs do")
    parser.add_argument(
        "config", nargs="?", help="run whose layouts and visual tokens are probed, too"
    )
    parser.add_argument("--timeout", type=positive, default=300, help="seconds of one probe")
    parser.add_argument("--require", choices=["gpu"], help="fail where nothing of a GPU could run")
    parser.add_argument("--bundle", help="JSON file to attach to a report")
    parser.set_defaults(run=run, takes_overrides=False)


def run(args: argparse.Namespace) -> None:
    """Print a line for every probe; the ranks but the first keep silent.

    Raises:
        ConfigError: of the run.
        LaunchError: a probe failed, none that needs a GPU ran where ``--require gpu`` asks for it,
            or ranks of one node run the command together.
    """
    from megatron_asvr.platforms import select
    from megatron_asvr.platforms.stack import entries

    from megatron_asvr.launch.rank import place
    from megatron_asvr.launch.smoke import LEVELS, smoke

    if args.config is not None:
        load(args.config)  # before probes that take minutes
    here, nodes = place(), int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    if here is not None and here.world_size > 1 and nodes == 1:
        raise LaunchError(
            f"{here.launcher} started {here.world_size} ranks; start `asvr gpu-smoke` once on a "
            "node, and with `srun --nodes=2 --ntasks-per-node=8` for what lies between two"
        )
    results = []
    for result in smoke(nodes=nodes, config=args.config, timeout_s=args.timeout):
        results.append(result)
        if here is None or here.rank == 0:
            bound = f" (expected: {result.expected})" if result.expected else ""
            print(f"{result.state:<8} {result.row}, {result.probe}: {result.measured}{bound}")
            if result.state == "FAIL":
                print(f"         next: {result.action}")
            sys.stdout.flush()
    failed = [result.probe for result in results if result.state == "FAIL"]
    if here is None or here.rank == 0:
        states = [result.state for result in results]
        counts = {state: states.count(state) for state in ("PASS", "FAIL", "NOT RUN")}
        print(", ".join(f"{number} {state}" for state, number in counts.items()))
        if args.bundle:
            report = {
                "host": socket.gethostname(),
                "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "platform": select()[1],
                "stack": [dataclasses.asdict(entry) for entry in entries(gpu=False)],
                "counts": counts,
                "results": [dataclasses.asdict(result) for result in results],
            }
            Path(args.bundle).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if failed:
        raise LaunchError(f"these probes failed: {', '.join(failed)}; see what is next above")
    of_gpus = [result for result in results if LEVELS[result.level]]
    if args.require == "gpu" and all(result.state == "NOT RUN" for result in of_gpus):
        raise LaunchError(
            f"--require gpu: nothing that needs a GPU ran ({select()[1]}); take this machine out "
            "of the job, or look at its driver with `asvr env --gpu`"
        )
