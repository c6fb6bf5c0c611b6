"""`asvr train`: run one training stage, or print what it would do."""

import argparse

from megatron_asvr.cli.common import add_config, plan_lines, read_config


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("train", help="train one stage; continues an interrupted run")
    add_config(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, train nothing"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Train in as many ranks as the layout needs."""
    from megatron_asvr.checkpoint.folder import RunFolder
    from megatron_asvr.launch.job import place
    from megatron_asvr.launch.job import run as run_job
    from megatron_asvr.train.loop import train

    config, world = read_config(args)
    if args.dry_run:
        print("\n".join(plan_lines(config, world)))
        return
    # Under a launcher every rank is here, and its logs are the launcher's.
    attempt = RunFolder(config.run.dir).next_attempt() if place() is None else None
    run_job(
        train,
        (config,),
        world,
        log_dir=attempt,
        threads_per_rank=config.train.threads_per_rank,
    )
