"""What several commands share: configuration arguments, the world size, starting ranks."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_asvr.config.check import check
from megatron_asvr.config.load import flatten, load
from megatron_asvr.config.schema import Config, SourceConfig
from megatron_asvr.planner.parameters import count_parameters, left_out

if TYPE_CHECKING:
    from megatron_asvr.model.tokenizer import VisualTokenizer
    from megatron_asvr.parallel.stored import Stored

NEW_TOKENS = 32  # of an answer, unless the command says otherwise


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the configuration file; settings and ranks as in ``add_overrides``."""
    parser.add_argument("config", help="YAML file or name of a preset")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Allow ``a.b=c`` settings and add the number of ranks."""
    parser.add_argument(
        "--nproc",
        "--ranks",
        dest="ranks",
        type=positive,
        help="processes on this machine (default: tp*pp*cp); a launcher's number wins",
    )
    parser.epilog = "Settings given as a.b=c win over the file's."
    parser.set_defaults(takes_overrides=True)


def add_questions(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add what `eval` and `verify` ask, and where their report goes."""
    parser.add_argument("--data", required=required, help="LLaVA-format JSON with the questions")
    parser.add_argument("--images", help="folder of its images (default: the JSON's)")
    parser.add_argument(
        "--max-new-tokens", type=positive, help=f"longest answer (default: {NEW_TOKENS})"
    )
    parser.add_argument("--out", help="JSON file for the report")


def question_source(args: argparse.Namespace) -> SourceConfig:
    """The file that ``add_questions`` asked for."""
    return SourceConfig(path=args.data, images=args.images)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


positive.__name__ = "number of at least 1"  # argparse shows it: "invalid ... value: '0'"


def natural(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


natural.__name__ = "number of at least 0"


def write_report(path: str, report: Any) -> None:
    """Write a report as JSON, whole or not at all; folders are made."""
    out = Path(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(out.name + ".part")
    unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(out)


def world_size(config: Config, ranks: int | None) -> int:
    """Number of ranks of this job: the launcher's, the user's, or one model replica."""
    from megatron_asvr.launch.job import place

    here, p = place(), config.parallel
    return here.world_size if here is not None else ranks or p.tp * p.pp * p.cp


def read_config(args: argparse.Namespace) -> tuple[Config, int]:
    """The checked configuration of a command and its world size."""
    config = load(args.config, args.overrides)
    world = world_size(config, args.ranks)
    return check(config, world), world


def run_config(args: argparse.Namespace) -> tuple[Config, int]:
    """The configuration of an existing run for answering, and the world size."""
    from megatron_asvr.train.inference import inference_config

    config = inference_config(args.model, args.overrides)
    return config, world_size(config, args.ranks)


def start_ranks(fn: Callable[..., Any], args: Sequence[Any], config: Config, world: int) -> Any:
    """What ``fn(*args)`` returns on rank 0; None on the other ranks of a launched job.

    So whoever gets a result prints it, once.
    """
    from megatron_asvr.launch.job import place, run

    result = run(
        fn,
        args,
        world,
        threads_per_rank=config.train.threads_per_rank,
        deterministic=config.train.deterministic,
    )
    here = place()
    return result if here is None or here.rank == 0 else None


def plan_lines(config: Config, world: int) -> list[str]:
    """The resolved plan that ``--dry-run`` prints."""
    from megatron_asvr.data.loader import Loader
    from megatron_asvr.data.text import TextTokenizer
    from megatron_asvr.model.linears import precision_lines
    from megatron_asvr.model.tokenizer import VisualTokenizer
    from megatron_asvr.parallel.plan import layout_lines
    from megatron_asvr.train.weight_sources import open_source

    tokenizer = None
    if config.loss.visual_weight:
        tokenizer = VisualTokenizer.load(str(config.model.visual_tokenizer))
        tokenizer.check_fits(config.model.vision)
    sizes, width = (tokenizer.codebook_sizes, tokenizer.width) if tokenizer else ((), None)
    counts = count_parameters(config.model, sizes or None, width)
    sources = {}
    lines = [f"{key} = {value}" for key, value in flatten(config).items()]
    lines += layout_lines(config, world, sizes)
    lines += precision_lines(config, sizes, width)
    for part, number in counts.items():
        state = "trained" if part in config.train.trainable else "frozen"
        source = config.init.source(part)
        if source is not None:
            sources[part] = open_source(source, [part], config).weights
        origin = source or f"run.seed={config.run.seed}"
        lines.append(f"{part}: {number:,} parameters, {state}, from {origin}")
    lines += encoding_lines(config, tokenizer, sources.get("vision_encoder", {}))
    text = TextTokenizer(str(config.model.text_tokenizer))
    with Loader(config, text, split="train") as data:
        lines.append(
            f"data: {data.num_samples:,} records, {data.steps:,} steps an epoch, "
            f"{data.total_steps:,} steps in all"
        )
        if config.data.features == "cache":
            lines.append(_feature_line(config, data.num_images))
        parts = data.blend()
        for name, taken, size in parts if len(parts) > 1 else ():
            lines.append(f"data {name}: {taken:,} samples an epoch of {size:,}")
    if config.data.eval:
        with Loader(config, text, split="eval") as held_out:
            lines.append(f"evaluation: {held_out.num_samples:,} records")
    return lines


def encoding_lines(
    config: Config, tokenizer: "VisualTokenizer | None", weights: Mapping[str, "Stored"]
) -> list[str]:
    """What of the encoder does not run, and whether it runs for the tokenizer too.

    Args:
        config: the run, checked.
        tokenizer: of its visual loss, if there is one.
        weights: that the encoder starts from, by canonical name; empty where the seed draws them.
    """
    number = left_out(config.model.vision)
    lines = [f"vision_encoder: {number:,} parameters behind the selected layer are left out"]
    return lines if tokenizer is None else [*lines, one_network(config, tokenizer, weights)[1]]


def one_network(
    config: Config, tokenizer: "VisualTokenizer", weights: Mapping[str, "Stored"]
) -> tuple[bool, str]:
    """Whether one pass of an encoder will give features and codes, and why.

    The arguments are those of ``encoding_lines``.
    """
    from megatron_asvr.model.asvr import DTYPES
    from megatron_asvr.model.images import one_pass

    def weight(name: str) -> Any:
        found = weights.get(f"vision_encoder.{name}")
        return None if found is None else found.read().to(DTYPES[config.train.precision])

    return one_pass(config, tokenizer, weight)


def _feature_line(config: Config, num_images: int) -> str:
    """How large a cache of features becomes."""
    model, name = config.model, {"fp32": "float32", "bf16": "bfloat16"}[config.train.precision]
    width = model.vision.hidden_size * model.resolution.num_scales
    size = model.vision.num_patches * width * {"float32": 4, "bfloat16": 2}[name]
    views = model.resolution.most_views
    many = f" of up to {views} views" if views > 1 else ""
    total = num_images * views * size / 2**30
    size_told = f"{size:,} bytes a view as {name}"
    return f"features: {size_told}, {total:.3f} GiB for {num_images:,} images{many}"
