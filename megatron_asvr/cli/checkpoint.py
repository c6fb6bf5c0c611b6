"""`asvr checkpoint`: list, show, verify, compare and delete the checkpoints of a run."""

import argparse
import json
from pathlib import Path

from megatron_asvr.cli.common import positive


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("checkpoint", help="list, verify and delete checkpoints")
    parser.set_defaults(takes_overrides=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    helps = {
        "ls": "one line for each checkpoint of a run",
        "show": "what a checkpoint holds",
        "verify": "read every file and compare its checksum; status 1 when one is damaged",
        "diff": "compare settings and weights of two checkpoints; status 1 when they differ",
        "prune": "delete old checkpoints, but never the newest one that verifies",
    }
    made = {name: actions.add_parser(name, help=text) for name, text in helps.items()}
    for name, action in made.items():
        action.add_argument("path", metavar="RUN", help="run folder, or one of its checkpoints")
        if name == "diff":
            action.add_argument("other", metavar="OTHER", help="run folder or checkpoint")
        action.add_argument("--json", action="store_true", help="print JSON")
        action.set_defaults(run=globals()[f"run_{name}"])
    made["verify"].add_argument("--all", action="store_true", help="every checkpoint of the run")
    prune = made["prune"]
    prune.add_argument("--keep", type=positive, help="newest to keep (default: the run's setting)")
    prune.add_argument(
        "--keep-every", type=positive, metavar="STEPS", help="keep its multiples too"
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would be deleted")


def run_ls(args: argparse.Namespace) -> None:
    """Print the checkpoints of a run, damaged ones too."""
    from megatron_asvr.checkpoint.inspect import listing

    rows = listing(Path(args.path))
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        state = "complete" if row["problem"] is None else row["problem"]
        print(f"step {row['step']:>8}  {row['bytes']:>15,} bytes  {row['written']}  {state}")


def run_show(args: argparse.Namespace) -> None:
    """Print what one checkpoint holds."""
    from megatron_asvr.checkpoint.inspect import contents

    facts = contents(Path(args.path))
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, item in value.items():
                print(f"  {name}: {item}")
        else:
            print(f"{key}: {value}")


def run_verify(args: argparse.Namespace) -> int:
    """Print which files are damaged; 1 when there is one."""
    from megatron_asvr.checkpoint.inspect import verified

    reports = verified(Path(args.path), every=args.all)
    if args.json:
        print(json.dumps(reports, indent=1))
    else:
        for report in reports:
            state = "; ".join(report["problems"]) or f"{report['files']} files are as written"
            print(f"{report['path']}: {state}")
    return int(any(report["problems"] for report in reports))


def run_diff(args: argparse.Namespace) -> int:
    """Print how two checkpoints differ; 1 when they do."""
    from megatron_asvr.checkpoint.inspect import differences

    report = differences(Path(args.path), Path(args.other))
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        for key, (mine, theirs) in report["settings"].items():
            print(f"{key}: {mine!r} against {theirs!r}")
        for name, what in report["weights"].items():
            print(f"{name}: {what}")
        print(f"{report['equal']} weights are equal, {len(report['weights'])} are not")
    return int(bool(report["settings"] or report["weights"]))


def run_prune(args: argparse.Namespace) -> None:
    """Delete what a policy lets go, and say so."""
    from megatron_asvr.checkpoint.inspect import pruned

    report = pruned(
        Path(args.path), keep=args.keep, keep_every=args.keep_every, dry_run=args.dry_run
    )
    if args.json:
        print(json.dumps(report, indent=1))
        return
    verb = "would delete" if args.dry_run else "deleted"
    print("\n".join(f"{verb} {path}" for path in report["deleted"]) or "nothing to delete")
    print(f"the newest checkpoint that verifies is step {report['newest_verified']}")
