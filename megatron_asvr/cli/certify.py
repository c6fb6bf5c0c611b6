"""`asvr certify`: prove that a layout computes what one rank computes."""

import argparse
import json
import re
from dataclasses import replace
from functools import partial
from typing import Any

from megatron_asvr.cli.common import positive, write_report
from megatron_asvr.config.load import load
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import ConfigError, LaunchError

SHOWN = 5  # bad images
FAILED = 1  # exit status: the layout computes something else


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "certify",
        help="prove that a layout computes what one rank computes",
        description="One step of the run on a few of its own samples, on one rank and in the "
        "layout: losses, gradients and outputs of modules must agree. The gradients of both are "
        "kept in the temporary folder (TMPDIR) meanwhile.",
        epilog="Settings given as a.b=c win over the file's.",
    )
    parser.add_argument("config", help="YAML file or name of a preset")
    parser.add_argument(
        "--layout",
        required=True,
        metavar="tp=2,pp=2,cp=1,dp=2,sp=true",
        help="degrees of the layout; also vpp and ep; what is not named is 1",
    )
    parser.add_argument(
        "--shrink", action="store_true", help="small model of the same structure, random weights"
    )
    parser.add_argument("--samples", type=positive, help="samples of the step (default: a few)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--json", metavar="FILE", help="report as JSON; - prints it, and no table")
    parser.add_argument("--prepare", action="store_true", help="compute missing codes first")
    parser.add_argument(
        "--collectives", action="store_true", help="compare the collectives of all ranks too"
    )
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Print the table, write the report; the exit status."""
    from megatron_asvr.launch.job import place
    from megatron_asvr.launch.local import run_ranks
    from megatron_asvr.train.certify import Request, certify

    here = place()
    if here is not None:
        raise LaunchError(
            f"`asvr certify` starts its own ranks on this machine, and {here.launcher} started "
            "this one; call it without a launcher"
        )
    config, dp = with_layout(load(args.config, args.overrides), args.layout)
    request = Request(
        config=config,
        dp=dp,
        samples=args.samples,
        precision=args.precision,
        shrink=args.shrink,
        prepare=args.prepare,
        collectives=args.collectives,
    )
    certificate = certify(
        request,
        partial(
            run_ranks,
            threads_per_rank=config.train.threads_per_rank,
            deterministic=config.train.deterministic,
        ),
    )
    report = certificate.plain()
    if args.json == "-":
        print(json.dumps(report, indent=1))
    else:
        print("\n".join(table(report, request.world)))
        if args.json:
            write_report(args.json, report)
    return 0 if report["ok"] else FAILED


def with_layout(config: Config, text: str) -> tuple[Config, int]:
    """The configuration in the layout that ``text`` describes, and its data-parallel degree.

    Explicit ``parallel.stages`` stay where the layout has as many stages, and
    ``parallel.head_alone`` where it has stages at all.

    Raises:
        ConfigError: a name is unknown or a value is wrong.
    """
    # A comma inside brackets, as of stages=[2,2], separates no settings.
    settings = [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]
    degrees = [part.removeprefix("dp=") for part in settings if part.startswith("dp=")]
    if any(not degree.isdecimal() or int(degree) < 1 for degree in degrees):
        raise ConfigError(f"--layout={text}: dp must be a whole number of at least 1")
    others = [f"parallel.{part}" for part in settings if not part.startswith("dp=")]
    layout = load(overrides=others).parallel
    stages = config.parallel.stages
    given = layout.stages is not None
    if not given and stages is not None and len(stages) == layout.pp * (layout.vpp or 1):
        layout = replace(layout, stages=stages)
    if layout.pp > 1 and layout.head_alone is None:
        layout = replace(layout, head_alone=config.parallel.head_alone)
    return replace(config, parallel=layout), int(degrees[-1]) if degrees else 1


def table(report: dict[str, Any], world: int) -> list[str]:
    """The report for a person."""
    layout = ", ".join(
        f"{name}={str(value).lower()}"
        for name, value in report["layout"].items()
        if value is True or value not in (None, False, 1)
    )
    model = "shrunk model" if report["shrunk"] else "model"
    lines = [
        f"{layout or 'one rank'} ({world} ranks) against one rank: {model}, "
        f"{report['precision']}, {len(report['samples'])} samples"
    ]
    replaced = [f"left out: {path}: {why}" for path, why in report["replaced"].items()]
    lines += replaced[:SHOWN]
    if len(replaced) > SHOWN:
        lines.append(f"left out: {len(replaced) - SHOWN} more")
    lines.append(f"{'':<22}{'one rank':>14}{'layout':>14}{'difference':>12}{'at most':>9}")
    for row in report["rows"]:
        numbers = "".join(f"{_number(row[side]):>14}" for side in ("reference", "layout"))
        lines.append(
            f"{row['name']:<22}{numbers}{_small(row['difference']):>12}{_small(row['bound']):>9}"
            f"  {'ok' if row['ok'] else 'FAIL'}"
        )
    lines.append("largest relative errors of gradients:")
    lines += [f"  {_small(error)}  {name}" for name, error in report["worst_gradients"].items()]
    return [*lines, *report["places"], "PASS" if report["ok"] else "FAIL"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.7g}"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
