"""`asvr data`: index the sources of a configuration, and look at what is in them."""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_asvr.cli import parity
from megatron_asvr.cli.common import positive
from megatron_asvr.config.check import check
from megatron_asvr.config.load import load
from megatron_asvr.config.schema import Config, SourceConfig
from megatron_asvr.errors import DataError


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("data", help="the samples of a configuration")
    parser.set_defaults(takes_overrides=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    index = actions.add_parser("index", help="check and measure every sample, once")
    index.add_argument(
        "--workers", type=positive, help="processes (default: one a core; mpiexec's own win)"
    )
    index.set_defaults(run=run_index)
    show = actions.add_parser("show", help="print what the index holds")
    show.set_defaults(run=run_show)
    for action in (index, show, parity.add(actions)):
        action.add_argument("config", help="YAML file or name of a preset")
        action.epilog = "Settings given as a.b=c win over the file's."
        action.set_defaults(takes_overrides=True)


def run_index(args: argparse.Namespace) -> None:
    """Make the index of both splits, or bring it up to date."""
    from megatron_asvr.platforms import select

    from megatron_asvr.data.index import build
    from megatron_asvr.data.text import TextTokenizer
    from megatron_asvr.launch.pool import workers

    config = check(load(args.config, args.overrides))
    text = TextTokenizer(str(config.model.text_tokenizer))
    device = select()[0].device
    with workers(args.workers or len(os.sched_getaffinity(0))) as run:
        for split, sources in _splits(config).items() if run is not None else ():
            start = time.monotonic()
            manifest = build(config, sources, text, device=device, run=run)
            _print(split, manifest)
            took_s = time.monotonic() - start
            print(f"{took_s:.1f} s; bad samples are named in {manifest['bad_samples']}")


def run_show(args: argparse.Namespace) -> None:
    """Print the manifests."""
    from megatron_asvr.data.index import index_folder, open_index
    from megatron_asvr.data.text import TextTokenizer

    config = check(load(args.config, args.overrides))
    text = TextTokenizer(str(config.model.text_tokenizer))
    for split, sources in _splits(config).items():
        index = open_index(config, sources, text)
        if index is None:
            folder = index_folder(config, sources)
            raise DataError(f"data.{split} has no index in {folder}; run `asvr data index` first")
        _print(split, index.manifest)


def _splits(config: Config) -> dict[str, Sequence[SourceConfig]]:
    splits = {"train": config.data.train, "eval": config.data.eval}
    return {name: sources for name, sources in splits.items() if sources}


def _print(split: str, manifest: Mapping[str, Any]) -> None:
    for source in manifest["sources"]:
        counts = {name: number for name, number in source.items() if name != "name"}
        print(f"data.{split} {source['name']}: {json.dumps(counts)}")
