"""Train one configuration in fp32, bf16 and emulated FP8 by each recipe, with the same seeds.

    python -m benchmarks.fp8 benchmarks/fp8.yaml --seeds 3 --write docs/fp8.md

Every run is an ordinary one in a folder of its own; interrupted, the same command goes on. The
table has loss and accuracy on held-out questions after the last step, and their differences to
fp32, paired by seed, with intervals of 95 % (Student's t).
"""

import argparse
import dataclasses
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_asvr.config.load import load
from megatron_asvr.config.schema import Config

BASE = "fp32"
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {},
    "delayed": {"recipe": "delayed", "format": "hybrid"},
    "current": {"recipe": "current", "format": "hybrid"},
    "block": {"recipe": "block", "format": "e4m3"},  # Transformer Engine's default formats
    "mxfp8": {"recipe": "mxfp8", "format": "e4m3"},
}
# Of Student's t for 95 %, by the number of pairs.
QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
MARKS = ("<!-- written by benchmarks/fp8.py -->", "<!-- end -->")
Pairs = list[tuple[float, float]]  # loss and accuracy of every seed


def variant(config: Config, name: str, seed: int) -> Config:
    """The configuration of one run, in a folder of its own.

    Args:
        config: of all.
        name: one of ``VARIANTS``.
        seed: of the weights and the order of the samples.
    """
    fp8 = dataclasses.replace(config.precision.fp8, emulate=True, **VARIANTS[name])
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=f"{config.run.dir}/{name}-{seed}", seed=seed),
        train=dataclasses.replace(config.train, precision="bf16" if name == "bf16" else "fp32"),
        precision=dataclasses.replace(config.precision, fp8=fp8),
    )


def measure(config: Config, seeds: int, names: Sequence[str]) -> dict[str, Pairs]:
    """Loss and accuracy on held-out data of every variant and seed."""
    from megatron_asvr.launch.local import run_ranks
    from megatron_asvr.train.loop import train

    results: dict[str, Pairs] = {name: [] for name in names}
    for seed in range(seeds):
        for name in names:
            report = run_ranks(train, (variant(config, name, seed),), 1)
            held_out = report["eval"]
            results[name].append((held_out["loss"], held_out["text_accuracy"]))
            print(f"{name}, seed {seed}: loss {held_out['loss']:.4f}", flush=True)
    return results


def table(results: Mapping[str, Pairs]) -> list[str]:
    """Lines of the table."""
    lines = [
        "| | loss | accuracy | loss against fp32 | accuracy against fp32, points |",
        "|---|---|---|---|---|",
    ]
    base = results[BASE]
    for name, values in results.items():
        losses, accuracies = zip(*values, strict=True)
        row = f"| {name} | {statistics.fmean(losses):.4f} | {statistics.fmean(accuracies):.4f} |"
        if name != BASE:
            pairs = list(zip(values, base, strict=True))
            relative = [100 * (mine[0] / theirs[0] - 1) for mine, theirs in pairs]
            points = [100 * (mine[1] - theirs[1]) for mine, theirs in pairs]
            row += f" {interval(relative)} % | {interval(points)} |"
        else:
            row += " | |"
        lines.append(row)
    return lines


def interval(values: Sequence[float]) -> str:
    """Mean and half of its 95 % interval; one value has none."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.2f}"
    half = QUANTILES[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.2f} +- {half:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write it into a document if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file; a run of it goes to run.dir/VARIANT-SEED")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 9))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--write", help="document whose table is replaced")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings of every run")
    args = parser.parse_args(arguments)
    config = load(args.config, args.overrides)
    names = list(dict.fromkeys([BASE, *args.variants]))
    lines = table(measure(config, args.seeds, names))
    print("\n".join(lines))
    if args.write:
        write(Path(args.write), lines)


def write(document: Path, lines: Sequence[str]) -> None:
    """Put the table between the two marks of a document."""
    text = document.read_text(encoding="utf-8")
    place = re.compile(f"{MARKS[0]}.*?{MARKS[1]}", re.DOTALL)
    if not place.search(text):
        raise SystemExit(f"{document} has no place for the table: {MARKS[0]} ... {MARKS[1]}")
    body = "\n".join([MARKS[0], "", *lines, "", MARKS[1]])
    document.write_text(place.sub(body, text), encoding="utf-8")


if __name__ == "__main__":
    main()
