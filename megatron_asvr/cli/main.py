"""`asvr`: parse the command line, run one command, turn our errors into one clear line."""

import argparse
import sys
from collections.abc import Sequence

from megatron_asvr import __version__
from megatron_asvr.cli import (
    certify,
    chat,
    checkpoint,
    convert,
    data,
    env,
    evaluate,
    plan,
    preflight,
    slurm,
    smoke,
    tokenizer,
    train,
)
from megatron_asvr.cli.train import STOPPED
from megatron_asvr.errors import AsvrError, LaunchError
from megatron_asvr.launch import outcome

COMMANDS = (
    *(data, train, certify, tokenizer, evaluate, chat, checkpoint, convert),
    *(slurm, plan, preflight, smoke, env),
)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line of `asvr`."""
    parser = argparse.ArgumentParser(
        prog="asvr",
        description="Train vision-language models with autoregressive semantic visual "
        "reconstruction on megatron-core.",
        epilog="Settings may be overridden anywhere on the line: train.steps=100 parallel.tp=2",
    )
    parser.add_argument("--version", action="version", version=f"asvr {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; ``overrides`` holds the ``a.b=c`` settings, wherever they stood."""
    parser = build_parser()
    args, overrides = parser.parse_known_args(argv)
    wrong = [text for text in overrides if text.startswith("-") or "=" not in text]
    if wrong:
        parser.error(f"unrecognized argument {wrong[0]!r}; settings are written a.b=c")
    if overrides and not args.takes_overrides:
        parser.error(f"`{args.command}` takes no settings here; got {overrides[0]!r}")
    args.overrides = overrides
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of one `asvr` call: 0, 1 after an error of ours, 130 after Ctrl-C.

    `asvr train` gives 3 when a signal stopped it early, after saving where it stands.
    """
    args = parse(argv)
    try:
        status = args.run(args) or 0
    except KeyboardInterrupt:
        print(f"asvr {args.command}: interrupted", file=sys.stderr)
        return 130
    except AsvrError as err:
        from megatron_asvr.platforms import faults

        from megatron_asvr.launch import job  # imports torch

        fault = faults.note_error(err)
        job.after_first()
        # An error of ours inside a rank is shown as itself; its traceback is in the rank's log.
        shown = err.__cause__ if isinstance(err.__cause__, AsvrError) else err
        print(f"asvr {args.command}: {type(shown).__name__}: {shown}", file=sys.stderr)
        # A rank that died, or its node: that may not happen again.
        if not isinstance(shown, LaunchError) and fault is None:
            outcome.note(outcome.REFUSED, f"{type(shown).__name__}: {shown}")
        return 1
    except Exception as err:
        from megatron_asvr.platforms import faults

        faults.note_error(err)
        raise
    outcome.note(outcome.STOPPED if status == STOPPED else outcome.FINISHED)
    if status == STOPPED:
        from megatron_asvr.launch import job

        sys.stdout.flush()
        job.part()
    return status


if __name__ == "__main__":
    sys.exit(main())
