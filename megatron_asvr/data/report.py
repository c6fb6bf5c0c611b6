"""What a data set is like, from its index: for people before a run, and as JSON.

Lengths, images and bad samples are of the whole split; how steps are filled and dealt is computed
for the first ``STEPS`` of them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from megatron_asvr.config.schema import Config
from megatron_asvr.data.index import Index
from megatron_asvr.data.loader import Loader
from megatron_asvr.data.plan import Planner
from megatron_asvr.data.records import named
from megatron_asvr.data.views import ImageLayouts

STEPS = 16
PERCENTS = (0, 5, 25, 50, 75, 95, 99, 100)
RANKS = (2, 4, 8, 16, 32, 64, 128)  # data-parallel


def corpus_report(
    config: Config, index: Index, loader: Loader, codebook_sizes: Sequence[int]
) -> dict[str, Any]:
    """Everything about one split, as plain values.

    Args:
        config: the run.
        index: of the split.
        loader: of the split, prepared.
        codebook_sizes: codes of every depth; empty without a visual head.
    """
    return {
        "sources": index.manifest["sources"],
        "samples": _samples(index),
        "images": _images(config, index),
        "steps": _steps(config, loader, codebook_sizes),
    }


def percentiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """The values at ``PERCENTS``, and the mean; empty without values."""
    if len(values) == 0:
        return {}
    found = np.percentile(values, PERCENTS, method="nearest").tolist()
    named = {f"p{percent}": value for percent, value in zip(PERCENTS, found, strict=True)}
    return {**named, "mean": float(np.mean(values))}


def _samples(index: Index) -> dict[str, Any]:
    table = index.samples.select(["kind", "text_tokens", "lengths", "cut_tokens"]).to_pydict()
    longest = [max(lengths) for lengths in table["lengths"] if lengths]
    cuts = np.array(table["cut_tokens"])
    bad = sum(source["bad_samples"] for source in index.manifest["sources"])
    return {
        "number": len(longest) + sum(not lengths for lengths in table["lengths"]),
        "kinds": dict(Counter(table["kind"]).most_common()),
        "bad": bad,
        "without_room": sum(not lengths for lengths in table["lengths"]),
        "cut": int((cuts > 0).sum()),
        "cut_tokens": int(cuts.sum()),
        "length": percentiles(longest),
        "text_tokens": percentiles(table["text_tokens"]),
        "images": percentiles([len(images) for images in index.images]),
    }


def _images(config: Config, index: Index) -> dict[str, Any]:
    entries = index.entries()
    good = [entry for entry in entries.values() if entry.problem is None]
    layouts = ImageLayouts(config.model)
    shown = Counter(path for images in index.images for path in images)
    reasons = Counter((entry.problem or "").partition(":")[0] for entry in entries.values())
    del reasons[""]
    return {
        "number": len(entries),
        "good": len(good),
        "bad": len(entries) - len(good),
        "reasons": dict(reasons.most_common()),
        "kinds": dict(Counter(entry.kind for entry in good).most_common()),
        "same_bytes_again": len(good) - len({entry.key for entry in good}),
        "shown_by_several_samples": sum(number > 1 for number in shown.values()),
        "width": percentiles([entry.width for entry in good]),
        "height": percentiles([entry.height for entry in good]),
        "pixels": percentiles([entry.width * entry.height for entry in good]),
        "positions": percentiles([layouts.of(entry.shape).length for entry in good]),
        "views": percentiles([layouts.of(entry.shape).num_views for entry in good]),
    }


def _steps(config: Config, loader: Loader, codebook_sizes: Sequence[int]) -> dict[str, Any]:
    facts = [loader.facts(step) for step in range(min(STEPS, max(1, loader.steps)))]
    held = sum(map(len, facts)) / len(facts)
    total = sum(len(loader.sample_ids(step)) for step in range(len(facts))) / len(facts)
    found: dict[str, Any] = {
        "an_epoch": loader.steps,
        "looked_at": len(facts),
        "placeholders": total - held,
        "balance": {},
    }
    for packing in (False, True):
        data = replace(config.data, packing=packing)
        planner = Planner(replace(config, data=data), codebook_sizes)
        plans = [planner.plan(samples) for samples in facts]
        length = planner.capacity if packing else config.data.max_length
        rows = sum(len(plan.items) for plan in plans)
        useful = sum(row.length for samples in facts for sample in samples for row in sample)
        found["packed" if packing else "unpacked"] = {
            "rows": rows / len(plans),
            "row_length": length,
            "useful": useful / max(1, rows * length),
        }
        if packing == config.data.packing:
            found["encoder_images"] = percentiles([plan.images for plan in plans])
            items = max(len(plan.items) for plan in plans)
            for dp in (dp for dp in RANKS if dp <= items):
                found["balance"][dp] = asdict(planner.imbalance(plans, dp))
    return found


def report_lines(split: str, report: dict[str, Any]) -> list[str]:
    """The report for people.

    Args:
        split: ``train`` or ``eval``.
        report: what ``corpus_report`` gave.
    """
    samples, images, steps = report["samples"], report["images"], report["steps"]
    lines = [f"data.{split}: {samples['number']:,} samples ({_counts(samples['kinds'])})"]
    lines += [
        f"  source {source['name']}: {source['samples']:,} samples, {source['images']:,} images, "
        f"{source['bad_samples']:,} bad"
        + (f"; left out: {named(source['left_out'])}" if source["left_out"] else "")
        for source in report["sources"]
    ]
    lines += [
        f"  cannot be used: {samples['bad']:,} samples, {samples['without_room']:,} of them "
        f"because nothing fits; cut: {samples['cut']:,} samples by {samples['cut_tokens']:,} "
        "tokens",
        *_spread("positions of the longest row", samples["length"]),
        *_spread("tokens of text", samples["text_tokens"]),
        f"  images: {images['good']:,} good, {images['bad']:,} bad ({_counts(images['reasons'])}); "
        f"{images['same_bytes_again']:,} hold the bytes of another, "
        f"{images['shown_by_several_samples']:,} are shown by several samples",
        f"  kinds of images: {_counts(images['kinds'])}",
        *_spread("width", images["width"]),
        *_spread("height", images["height"]),
        *_spread("pixels", images["pixels"]),
        *_spread("positions of an image", images["positions"]),
        f"  steps of an epoch: {steps['an_epoch']:,}; of the first {steps['looked_at']}, each "
        f"with {steps['placeholders']:,.1f} samples that hold nothing:",
        *_spread("images encoded", steps["encoder_images"]),
    ]
    for name in ("unpacked", "packed"):
        rows = steps[name]
        lines.append(
            f"    {name}: {rows['rows']:,.1f} rows a step, {rows['useful']:.1%} of their "
            f"{rows['row_length']:,} positions used"
        )
    for dp, found in steps["balance"].items():
        lines.append(
            f"    work of {dp} data-parallel ranks, max/mean: {found['by_count']:.3f} dealt by "
            f"count, {found['by_cost']:.3f} by modelled operations"
        )
    return lines


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {name}" for name, number in numbers.items()) or "none"


def _spread(name: str, values: dict[str, float]) -> list[str]:
    if not values:
        return []
    shown = ", ".join(f"{key} {value:,.0f}" for key, value in values.items())
    return [f"  {name}: {shown}"]
