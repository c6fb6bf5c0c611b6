"""`asvr data check` and `asvr data show`: what is in the sources, as numbers and as a page."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_asvr.cli.common import positive, write_report
from megatron_asvr.config.check import check
from megatron_asvr.config.load import load
from megatron_asvr.config.schema import Config, SourceConfig
from megatron_asvr.errors import ConfigError, DataError
from megatron_asvr.log import show_log


def add(actions: argparse._SubParsersAction) -> list[argparse.ArgumentParser]:
    """Register the actions."""
    report = actions.add_parser("check", help="report sizes, lengths, bad samples and packing")
    report.add_argument("--workers", type=positive, help="processes that make the index")
    report.add_argument("--out", help="JSON file for the report")
    report.set_defaults(run=run_check)
    show = actions.add_parser("show", help="print what the index holds, or render samples")
    show.add_argument("--out", help="HTML file: one step's samples as training sees them")
    show.add_argument("--step", type=int, default=0, help="step of the page")
    show.add_argument("--samples", type=positive, default=8, help="samples shown whole")
    show.add_argument("--split", choices=("train", "eval"), default="train", help="of the page")
    show.set_defaults(run=run_show)
    return [report, show]


def splits(config: Config) -> dict[str, Sequence[SourceConfig]]:
    """The sources of every split that has some."""
    found = {"train": config.data.train, "eval": config.data.eval}
    return {name: sources for name, sources in found.items() if sources}


def run_check(args: argparse.Namespace) -> None:
    """Print the report of every split; the index is made first where it is missing."""
    from megatron_asvr.platforms import select

    from megatron_asvr.data.index import build, open_index
    from megatron_asvr.data.report import corpus_report, report_lines
    from megatron_asvr.data.text import TextTokenizer
    from megatron_asvr.launch.pool import workers
    from megatron_asvr.train.assemble import codebook_sizes

    show_log("stderr")
    config = check(load(args.config, args.overrides))
    text = TextTokenizer(str(config.model.text_tokenizer))
    device, sizes = select()[0].device, codebook_sizes(config)
    with workers(args.workers or len(os.sched_getaffinity(0))) as run:
        if run is None:
            return
        for sources in splits(config).values():
            build(config, sources, text, device=device, run=run)
    found: dict[str, Any] = {}
    for split, sources in splits(config).items():
        index = open_index(config, sources, text)
        with _loader(config, text, split, sizes) as loader:
            found[split] = corpus_report(config, index, loader, sizes)
            print("\n".join(report_lines(split, found[split])))
            if split == "train":
                steps = found[split]["steps"]["of_the_run"] = loader.total_steps
                print(f"  steps of the run: {steps:,}")
    if args.out is not None:
        write_report(args.out, found)


def run_show(args: argparse.Namespace) -> None:
    """Print the manifests, or write the page of a step."""
    from megatron_asvr.data.index import index_folder, open_index
    from megatron_asvr.data.text import TextTokenizer

    config = check(load(args.config, args.overrides))
    text = TextTokenizer(str(config.model.text_tokenizer))
    if args.out is not None:
        _write_page(config, text, args)
        return
    for split, sources in splits(config).items():
        index = open_index(config, sources, text)
        if index is None:
            folder = index_folder(config, sources)
            raise DataError(f"data.{split} has no index in {folder}; run `asvr data index` first")
        print("\n".join(manifest_lines(split, index.manifest)))


def manifest_lines(split: str, manifest: dict[str, Any]) -> list[str]:
    """The counts of every source of an index."""
    lines = []
    for source in manifest["sources"]:
        counts = {name: number for name, number in source.items() if name != "name"}
        lines.append(f"data.{split} {source['name']}: {json.dumps(counts)}")
    return lines


def _write_page(config: Config, text: Any, args: argparse.Namespace) -> None:
    from megatron_asvr.data.page import step_page
    from megatron_asvr.data.plan import Planner
    from megatron_asvr.train.assemble import codebook_sizes

    out = Path(args.out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out={args.out}: the page is HTML; give a name that ends in .html")
    if args.split not in splits(config):
        raise ConfigError(f"data.{args.split} lists no sources; nothing can be shown of it")
    sizes = codebook_sizes(config)
    with _loader(config, text, args.split, sizes) as loader:
        last = loader.steps - 1 if args.split == "eval" else None
        if args.step < 0 or (last is not None and args.step > last):
            raise ConfigError(f"--step={args.step} is none of the {loader.steps} steps")
        page = step_page(
            args.step,
            loader.samples(args.step),
            Planner(config, sizes).plan(loader.facts(args.step)),
            total=len(loader.sample_ids(args.step)),
            shown=args.samples,
            tokenizer=text,
            pixels=loader.pixels_of,
            report=loader.report(),
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    print(f"step {args.step} of data.{args.split}: {out}")


def _loader(config: Config, text: Any, split: Any, sizes: Sequence[int]) -> Any:
    """A prepared loader with the rows that a run would have."""
    from megatron_asvr.data.loader import Loader
    from megatron_asvr.train.assemble import shares_images

    loader = Loader(
        config, text, split=split, branches=shares_images(config)[0], codebook_sizes=sizes
    )
    loader.prepare()
    return loader
