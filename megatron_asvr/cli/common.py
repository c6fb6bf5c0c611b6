"""What several commands share: configuration arguments, the world size, the plan's text."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from megatron_asvr.config.check import check, check_world
from megatron_asvr.config.load import flatten, load
from megatron_asvr.config.schema import Config
from megatron_asvr.planner.parameters import count_parameters


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the configuration file, its overrides and the number of ranks."""
    parser.add_argument("config", help="YAML file or name of a preset")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add ``a.b=c`` overrides and the number of ranks."""
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that win")
    parser.add_argument("--ranks", type=int, help="processes on this machine (default: tp*pp*cp)")


def world_size(config: Config, ranks: int | None) -> int:
    """Number of ranks of this job: the launcher's, the user's, or one model replica."""
    p = config.parallel
    return int(os.environ.get("WORLD_SIZE") or ranks or p.tp * p.pp * p.cp)


def read_config(args: argparse.Namespace) -> tuple[Config, int]:
    """The checked configuration of a command and its world size."""
    config = check(load(args.config, args.overrides))
    world = world_size(config, args.ranks)
    check_world(config, world)
    return config, world


def plan_lines(config: Config, world: int, facts: Iterable[tuple[str, str]]) -> list[str]:
    """The resolved plan that ``--dry-run`` prints."""
    sizes = codebook_sizes(config)
    counts = (
        count_parameters(config.model, *sizes) if sizes else count_parameters(config.model, None)
    )
    p = config.parallel
    lines = [f"{key} = {value}" for key, value in flatten(config).items()]
    lines.append(f"layout: {world} ranks = tp {p.tp} x dp {world // p.tp}")
    for part, number in counts.items():
        state = "trained" if part in config.train.trainable else "frozen"
        lines.append(f"{part}: {number:,} parameters, {state}")
    lines += [f"{name}: {value}" for name, value in facts]
    return lines


def codebook_sizes(config: Config) -> tuple[tuple[int, ...], int] | None:
    """Codes of every depth and the code width, from the tokenizer's folder; None without one."""
    if config.loss.visual_weight == 0:
        return None
    from megatron_asvr.model.tokenizer import VisualTokenizer

    tokenizer = VisualTokenizer.load(Path(str(config.model.visual_tokenizer)))
    return tuple(tokenizer.codebook_sizes), tokenizer.width
