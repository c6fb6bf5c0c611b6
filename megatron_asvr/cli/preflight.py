"""`asvr preflight`: whether the nodes of a job can run together, before it does."""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

from megatron_asvr.cli.common import positive
from megatron_asvr.errors import LaunchError
from megatron_asvr.launch import outcome


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("preflight", help="check that nodes can run together")
    parser.add_argument(
        "config", nargs="?", help="run whose data, weights and folder are looked at"
    )
    parser.add_argument("--nproc", type=positive, default=1, help="ranks on this machine")
    parser.add_argument("--folder", help="shared storage to test (default: the run's folder, or .)")
    parser.add_argument(
        "--write-mib", type=positive, default=64, help="written there by every node"
    )
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a rank may be silent")
    parser.add_argument("--skew", type=float, default=1.0, help="seconds clocks may differ")
    parser.add_argument("--min-gb-s", type=float, default=0.0, help="least bandwidth of two nodes")
    parser.add_argument("--no-probes", action="store_true", help="leave out the probes of each GPU")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Check, print the report on rank 0, and give 1 on every rank when something is wrong."""
    from megatron_asvr.launch.findings import Limits
    from megatron_asvr.launch.local import run_ranks
    from megatron_asvr.launch.node import Wish
    from megatron_asvr.launch.preflight import Settings, preflight
    from megatron_asvr.launch.rank import place
    from megatron_asvr.launch.smoke import SHORT
    from megatron_asvr.launch.worker import leave

    os.environ.pop(outcome.VARIABLE, None)  # a job's outcome is that of the step that follows
    settings = Settings(
        wish=Wish(
            config=args.config,
            overrides=tuple(args.overrides),
            folder=args.folder,
            write_mib=args.write_mib,
        ),
        limits=Limits(skew_s=args.skew, min_gb_s=args.min_gb_s),
        timeout_s=args.timeout,
        probes=() if args.no_probes else SHORT,
    )
    here, hangs = place(), False
    if here is None:
        with tempfile.TemporaryDirectory(prefix="asvr-") as folder:
            local = dataclasses.replace(settings, store=str(Path(folder, "store")))
            report, _ = run_ranks(preflight, (local,), args.nproc, init=False)
    else:
        report, hangs = preflight(settings)
    if here is None or here.rank == 0:
        if args.json:
            print(json.dumps({"ok": report.ok, **dataclasses.asdict(report)}, indent=1))
        else:
            print("\n".join(f"{name:<10} {state:<12} {text}" for name, state, text in report.rows))
        if not report.ok:
            _exclude({fault["node"] for fault in report.wrong})
            faults = "; ".join(f"{w['node']} ({w['check']}): {w['text']}" for w in report.wrong)
            error = LaunchError(f"these nodes must not start a run: {faults}")
            if not hangs:
                raise error
            print(f"asvr preflight: LaunchError: {error}", file=sys.stderr)
    if hangs:
        leave(1)  # the interpreter would wait for what hangs
    return 0 if report.ok else 1


def _exclude(faulty: set[str]) -> None:
    """Keep a job off faulty nodes; a fault of all nodes, or between two, is not theirs."""
    single = {node for node in faulty if " " not in node}
    if len(single) < int(os.environ.get("SLURM_STEP_NUM_NODES", "1")):
        outcome.exclude(sorted(single))
