"""`asvr train`: run one training stage, or print what it would do."""

import argparse
from typing import Any

from megatron_asvr.cli.common import add_config, plan_lines, read_config

STOPPED = 3  # exit status: a signal ended the run before its last step


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("train", help="train one stage; continues an interrupted run")
    add_config(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings, sources of weights and records, print the plan, train nothing",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train in as many ranks as the layout needs; the exit status."""
    from megatron_asvr.checkpoint.folder import RunFolder
    from megatron_asvr.launch.job import place
    from megatron_asvr.launch.job import run as run_job
    from megatron_asvr.train.loop import train

    config, world = read_config(args)
    if args.dry_run:
        print("\n".join(plan_lines(config, world)))
        return 0
    # Under a launcher every rank is here, and its logs are the launcher's.
    launched = place()
    attempt = None
    if launched is None:
        attempt = RunFolder(config.run.dir).next_attempt()
        print(f"logs of the ranks: {attempt}", flush=True)
    result = run_job(
        train,
        (config,),
        world,
        log_dir=attempt,
        threads_per_rank=config.train.threads_per_rank,
        deterministic=config.train.deterministic,
    )
    if launched is None or launched.rank == 0:
        print("\n".join(summary_lines(result)))
    return 0 if result["finished"] else STOPPED


def summary_lines(result: dict[str, Any]) -> list[str]:
    """What a run came to, in a few lines.

    Args:
        result: what ``megatron_asvr.train.loop.train`` returned.
    """
    lines = [f"run: {result['run']}"]
    lines += [f"not continued from: {why}" for why in result["skipped_checkpoints"].values()]
    if result["failed_saves"]:
        lines.append(f"saves that failed: {result['failed_saves']}")
    for split in ("train", "eval"):
        values = result[split]
        names = [k for k in ("loss", "text_loss", "visual_loss", "text_accuracy") if k in values]
        if names:
            numbers = ", ".join(f"{name} {values[name]:.4f}" for name in names)
            lines.append(f"{split} at step {values['step']}: {numbers}")
    if not result["finished"]:
        where = f"{result['step']} of {result['total_steps']}"
        lines.append(f"stopped by a signal at step {where}; the same command continues it")
    peak = max(result["peak_mem_bytes"]) / 2**30
    lines.append(f"{result['tokens']:,} tokens; peak memory of a rank {peak:.2f} GiB")
    for rank, report in enumerate(result["data"]):
        found = ", ".join(f"{name} {value}" for name, value in report.items() if _told(name, value))
        if found:
            lines.append(f"data of data-parallel rank {rank}: {found}")
    return lines


def _told(name: str, value: Any) -> bool:
    """Whether a number of a data report is about something that was not as it should be."""
    return name not in ("records", "images") and isinstance(value, int) and value > 0
