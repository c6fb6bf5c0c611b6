"""`asvr plan`: what every rank of a run needs of its GPU's memory, before there is a GPU."""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_asvr.cli.common import positive
from megatron_asvr.config.check import check
from megatron_asvr.config.load import load
from megatron_asvr.config.schema import Config

if TYPE_CHECKING:
    from megatron_asvr.model.tokenizer import TokenizerConfig
    from megatron_asvr.planner.memory import RankMemory

GB = 10**9
PAPER = (16384,) * 8  # codes of every depth where no tokenizer is there to ask
NOT_FITTING = 1  # exit status
# GB of a GPU that no plan counts: guesses until measured. DALI decodes up to 64 images at once, of
# 10 megapixels in 2 GB; NCCL keeps buffers for every group.
RESERVE = {"CUDA and its libraries": 2, "NCCL": 2, "DALI": 2, "gaps between tensors": 2}


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("plan", help="print the memory that every rank will need")
    parser.add_argument("config", metavar="CONFIG", help="YAML file or name of a preset")
    parser.add_argument("--nodes", type=positive, default=1, help="default: 1")
    parser.add_argument("--gpus-per-node", type=positive, default=8, help="default: 8")
    parser.add_argument("--gpu-gb", type=positive, default=80, help="of a GPU, 10^9 bytes (80)")
    parser.add_argument(
        "--reserve-gb",
        type=positive,
        default=sum(RESERVE.values()),
        help="for CUDA, NCCL, DALI and gaps between tensors: a guess until measured (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON, in bytes")
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Print the table; the exit status is 1 where a rank's peak does not fit.

    Raises:
        ConfigError: the run cannot have this many ranks, or is a mixture of experts.
    """
    os.environ["ASVR_PLATFORM"] = "cpu"  # a GPU that is there stays unused
    from megatron_asvr.planner.memory import plan_memory

    world = args.nodes * args.gpus_per_node
    config = check(load(args.config, args.overrides), world)
    tokenizer, note = _tokenizer(config)
    joined, how = _joined(config)
    ranks = plan_memory(config, world, tokenizer, joined=joined)
    room = (args.gpu_gb - args.reserve_gb) * GB
    fits = all(rank.peak <= room for rank in ranks)
    if args.json:
        print(json.dumps(_report(ranks, world, room, note + how, fits=fits), indent=1))
    else:
        print("\n".join(_lines(config, ranks, world, args, note + how)))
    return 0 if fits else NOT_FITTING


def _reserved(gb: int) -> str:
    """What the reserve is for: its parts, or only their names where another one was asked for."""
    known = gb == sum(RESERVE.values())
    return ", ".join(f"{name} {part}" if known else name for name, part in RESERVE.items())


def _tokenizer(config: Config) -> "tuple[TokenizerConfig | None, str]":
    """What the visual tokenizer quantises, and where that is known from."""
    from megatron_asvr.model.tokenizer import CONFIG_FILE, TokenizerConfig, VisualTokenizer

    if not config.loss.visual_weight:
        return None, "no visual loss"
    folder = config.model.visual_tokenizer
    if folder is not None and (Path(folder) / CONFIG_FILE).is_file():
        return VisualTokenizer.describe(folder), f"codes of {folder}"
    vision = config.model.vision
    assumed = TokenizerConfig(
        kind="semantic", vision=vision, feature_layer=-2, codebook_sizes=PAPER
    )
    return assumed, f"{len(PAPER)} x {PAPER[0]:,} codes assumed: {folder} is not there"


def _joined(config: Config) -> tuple[bool, str]:
    """Whether an online tokenizer is the model's encoder, as far as there are files to ask."""
    from megatron_asvr.cli.common import one_network
    from megatron_asvr.model.tokenizer import VisualTokenizer
    from megatron_asvr.train.weight_sources import open_source

    if not config.loss.visual_weight or config.data.codes == "cache":
        return False, ""
    folder, source = config.model.visual_tokenizer, config.init.source("vision_encoder")
    if not (folder and source and Path(folder).exists() and Path(source).exists()):
        return False, "; an encoder of its own is assumed for the tokenizer"
    weights = open_source(source, ["vision_encoder"], config).weights
    joined, told = one_network(config, VisualTokenizer.load(folder), weights)
    return joined, f"; {told}"


def _report(
    ranks: "list[RankMemory]", world: int, room: int, note: str, *, fits: bool
) -> dict[str, Any]:
    stages = [{**dataclasses.asdict(rank), "peak": rank.peak} for rank in ranks]
    return {"ranks": world, "codes": note, "room": room, "fits": fits, "stages": stages}


def _lines(
    config: Config, ranks: "list[RankMemory]", world: int, args: argparse.Namespace, note: str
) -> list[str]:
    from megatron_asvr.planner.memory import layers_on_gpu
    from megatron_asvr.planner.rehearsal import largest

    shape, t = largest(config), config.train
    room = args.gpu_gb - args.reserve_gb
    lines = [
        f"{world} ranks; micro-batches of {shape.rows} x {shape.length} positions with "
        f"{shape.images} images, recompute {t.recompute}, layers {layers_on_gpu(config)}; {note}",
        "stage ranks layers in-flight     parameters  weights  gradients  optimizer   kept  "
        "forward  backward   peak (GB)",
    ]
    for rank in ranks:
        s = rank.state
        sizes = (s.weights + s.constants, s.gradients, s.optimizer, rank.kept)
        weights, gradients, optimizer, kept = (size / GB for size in sizes)
        verdict = "fits" if rank.peak <= room * GB else "TOO MUCH"
        lines.append(
            f"{rank.stage:>5} {rank.ranks:>5} {rank.layers:>6} {rank.in_flight:>9} "
            f"{s.parameters:>14,} {weights:>8.2f} {gradients:>10.2f} {optimizer:>10.2f} "
            f"{kept:>6.2f} {rank.forward / GB:>8.2f} {rank.backward / GB:>9.2f} "
            f"{rank.peak / GB:>6.2f}  {verdict}"
        )
    lines.append(
        f"room: {room} GB, of {args.gpu_gb} GB less {args.reserve_gb} GB in reserve "
        f"({_reserved(args.reserve_gb)}; not measured)"
    )
    return lines
