"""`asvr data`: index the sources of a configuration, and look at what is in them."""

import argparse
import os
import time

from megatron_asvr.cli import corpus, parity
from megatron_asvr.cli.common import positive
from megatron_asvr.config.check import check
from megatron_asvr.config.load import load
from megatron_asvr.log import show_log


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
    for action in (index, *corpus.add(actions), parity.add(actions)):
        action.add_argument("config", help="YAML file or name of a preset")
        action.epilog = "Settings given as a.b=c win over the file's."
        action.set_defaults(takes_overrides=True)


def run_index(args: argparse.Namespace) -> None:
    """Make the index of both splits, or bring it up to date."""
    from megatron_asvr.platforms import select

    from megatron_asvr.data.index import build
    from megatron_asvr.data.text import TextTokenizer
    from megatron_asvr.launch.pool import workers

    show_log("stderr")
    config = check(load(args.config, args.overrides))
    text = TextTokenizer(str(config.model.text_tokenizer))
    device = select()[0].device
    with workers(args.workers or len(os.sched_getaffinity(0))) as run:
        for split, sources in corpus.splits(config).items() if run is not None else ():
            start = time.monotonic()
            manifest = build(config, sources, text, device=device, run=run)
            print("\n".join(corpus.manifest_lines(split, manifest)))
            took_s = time.monotonic() - start
            print(f"{took_s:.1f} s; bad samples are named in {manifest['bad_samples']}")
