"""`asvr data parity`: are DALI's pixels the reference's, to the visual tokenizer?"""

import argparse
from dataclasses import asdict

from megatron_asvr.cli.common import positive, write_report
from megatron_asvr.config.check import check
from megatron_asvr.config.load import load
from megatron_asvr.errors import ConfigError, DataError


def add(actions: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Register the action."""
    parser = actions.add_parser("parity", help="compare DALI's pixels and codes with PIL's")
    parser.add_argument("--images", type=positive, default=64, help="of each kind, at most")
    parser.add_argument("--out", help="JSON file for the report")
    parser.set_defaults(run=run_parity)
    return parser


def run_parity(args: argparse.Namespace) -> None:
    """Print differences of pixels and codes by kind of image."""
    from megatron_asvr.platforms import select

    from megatron_asvr.data.sources import Sources
    from megatron_asvr.model.tokenizer import VisualTokenizer
    from megatron_asvr.train.parity import measure, refusal, table

    config = check(load(args.config, args.overrides))
    if config.model.visual_tokenizer is None:
        raise ConfigError(
            "model.visual_tokenizer is not set, and parity is about its codes; give a folder "
            "written by `asvr tokenizer fit`"
        )
    device = select()[0].device
    tokenizer = VisualTokenizer.load(config.model.visual_tokenizer)
    tokenizer.check_fits(config.model.vision)
    sources = Sources(config, config.data.train, device=device)
    sources.prepare()
    found = measure(config, sources, tokenizer.to(device), device=device, images=args.images)
    print("\n".join(table(found)))
    if args.out is not None:
        write_report(args.out, {"kinds": [asdict(each) for each in found]})
    limits = config.data.parity_max_flip
    over = [each.kind for each in found if limits and each.exceeds(limits)]
    if over:
        raise DataError(refusal(over, tuple(dict.fromkeys((*config.data.pil_kinds, *over)))))
