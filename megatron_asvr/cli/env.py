"""`asvr env`: what is installed here, against what is supported."""

import argparse
import dataclasses
import json

from megatron_asvr.errors import ConfigError


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("env", help="compare what is installed with what is supported")
    parser.add_argument("--gpu", action="store_true", help="what GPUs need has to be here")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run, takes_overrides=False)


def run(args: argparse.Namespace) -> None:
    """Print the table.

    Raises:
        ConfigError: something that this machine needs is missing or not supported.
    """
    from megatron_asvr.platforms.stack import entries

    found = list(entries(gpu=args.gpu))
    if args.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in found], indent=1))
    else:
        for entry in found:
            version = "-" if entry.found is None else entry.found
            print(f"{entry.name:<20} {entry.state:<9} {version:<16} {entry.note}".rstrip())
    wrong = [f"{e.name} {e.found or 'missing'} ({e.note})" for e in found if e.state == "WRONG"]
    if wrong:
        raise ConfigError(f"this machine cannot run everything it has to: {'; '.join(wrong)}")
