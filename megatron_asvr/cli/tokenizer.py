"""`asvr tokenizer`: fit a visual tokenizer, fill the caches, look at a tokenizer."""

import argparse
import json
from pathlib import Path

from megatron_asvr.cli.common import add_config, positive, read_config, start_ranks
from megatron_asvr.config.schema import SourceConfig
from megatron_asvr.errors import ConfigError


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("tokenizer", help="the visual tokenizer and its codes")
    parser.set_defaults(takes_overrides=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_fit(actions.add_parser("fit", help="fit residual codebooks on a frozen encoder; resumes"))
    encode = actions.add_parser("encode", help="compute and cache codes and features of all images")
    add_config(encode)
    encode.set_defaults(run=run_encode)
    inspect = actions.add_parser("inspect", help="print what a tokenizer is and how good it is")
    inspect.add_argument("folder", help="folder written by `asvr tokenizer fit`")
    inspect.set_defaults(run=run_inspect)


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vision", required=True, help="Hugging Face folder of the encoder")
    parser.add_argument("--data", required=True, help="images to use: any form of data.train")
    parser.add_argument("--images", help="folder of a JSON's images (default: its own)")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--depth", type=positive, default=8, help="levels (default: 8)")
    parser.add_argument(
        "--codebook-size",
        default="16384",
        help="codewords: one number, or one a level separated by commas (default: 16384)",
    )
    parser.add_argument("--kind", choices=("semantic", "appearance"), default="semantic")
    parser.add_argument(
        "--feature-layer",
        default="-2",
        help="hidden state to quantise, or `pixels` (appearance only; default: -2)",
    )
    parser.add_argument("--image-fit", choices=("square", "pad"), default="square")
    parser.add_argument(
        "--max-images", type=positive, default=10_000, help="images to read (default: 10000)"
    )
    parser.add_argument(
        "--max-vectors",
        type=positive,
        help="patches to keep, over all ranks: 4 bytes x width each, in memory and in OUT until "
        "the end (default: 64 a codeword, at least 65536)",
    )
    parser.add_argument(
        "--nproc",
        "--ranks",
        dest="ranks",
        type=positive,
        default=1,
        help="processes on this machine",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iters", type=positive, default=10, help="k-means iterations a level")
    parser.set_defaults(run=run_fit)


def run_fit(args: argparse.Namespace) -> None:
    """Fit, save and print the report; an interrupted fit goes on."""
    from megatron_asvr.launch.job import place, run
    from megatron_asvr.train.fit import FitRequest, fit_tokenizer

    request = FitRequest(
        vision=args.vision,
        sources=(SourceConfig(path=args.data, images=args.images),),
        out=args.out,
        codebook_sizes=_sizes(args.codebook_size, args.depth),
        kind=args.kind,
        feature_layer=_layer(args.feature_layer),
        image_fit=args.image_fit,
        max_images=args.max_images,
        max_vectors=args.max_vectors,
        seed=args.seed,
        iters=args.iters,
    )
    here = place()
    report = run(fit_tokenizer, (request,), args.ranks if here is None else here.world_size)
    if here is None or here.rank == 0:
        _print_report(report)


def run_encode(args: argparse.Namespace) -> None:
    """Fill the caches of a configuration's images."""
    from megatron_asvr.train.caches import encode_all

    config, world = read_config(args)
    done = start_ranks(encode_all, (config,), config, world)
    if done is not None:
        print(json.dumps(done))


def run_inspect(args: argparse.Namespace) -> None:
    """Print a tokenizer's description and its fit report."""
    from megatron_asvr.model.tokenizer import VisualTokenizer
    from megatron_asvr.train.fit import REPORT_FILE

    tokenizer = VisualTokenizer.load(args.folder)
    report_file = Path(args.folder) / REPORT_FILE
    if report_file.is_file():
        _print_report(json.loads(report_file.read_text(encoding="utf-8")))
        return
    print(
        f"{tokenizer.config.kind} tokenizer, codebooks {list(tokenizer.codebook_sizes)}, "
        f"width {tokenizer.width}, fingerprint {tokenizer.fingerprint[:16]}; no fit report"
    )


def _sizes(text: str, depth: int) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--codebook-size={text!r} is not a list of whole numbers") from None
    if len(sizes) == 1:
        sizes *= depth
    if len(sizes) != depth or depth < 1:
        raise ConfigError(f"--codebook-size gives {len(sizes)} sizes for --depth={depth} levels")
    return sizes


def _layer(text: str) -> int | None:
    if text == "pixels":
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--feature-layer={text!r}; give a whole number or `pixels`") from None


def _print_report(report: dict) -> None:
    sizes = ", ".join(str(size) for size in report["codebook_sizes"])
    print(
        f"{report['kind']} tokenizer {report['fingerprint'][:16]}: codebooks {sizes}; "
        f"width {report['width']}; fitted on {report['num_images']} images"
        + (f", {report['num_vectors']} of their patches" if "num_vectors" in report else "")
    )
    for path, why in report["bad_images"].items():
        print(f"left out: {path}: {why}")
    print("level  cosine  mse        usage  perplexity")
    for level in report["levels"]:
        print(
            f"{level['level']:>5}  {level['cosine']:.4f}  {level['mse']:.3e}  "
            f"{level['usage']:.3f}  {level['perplexity']:.1f}"
        )
