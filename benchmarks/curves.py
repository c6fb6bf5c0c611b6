"""Scaling curves: what a step of training costs as one size of it grows, as CSV and PNG.

    python -m benchmarks.curves [--short] [--steps 3] [--rounds 3] [--only AXIS ...] [--out FOLDER]

Every point is a process of its own (several, for the axis of ranks) that trains some steps at the
sizes of `benchmarks.workload`, with one of them changed. CPU-seconds stand beside wall seconds,
which other processes on the machine lengthen.

The layouts of ranks train the same samples, and are measured in rounds, one layout after the other,
so that what is compared was measured in the same minutes. For two pipeline stages, the time stands
beside the least that the stages' work and the schedule's bubble allow, with the CPU-seconds of each
stage in the same run, and with shares of them as the cost model splits them.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.points import measure
from benchmarks.workload import MID, SHORT, Workload
from megatron_asvr.launch.local import run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "1": (1, {"tp": 1}),
    "dp2": (2, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
}
FULL = {
    "positions": (64, 144, 256, 400),
    "codebook": (2048, 4096, 8192, 16384),
    "depth": (1, 2, 4, 8),
    "vocabulary": (8000, 16000, 32000, 64000),
    "text": (64, 128, 256, 512),
}
REDUCED = {
    "positions": (16, 64),
    "codebook": (256, 1024),
    "depth": (1, 4),
    "vocabulary": (1000, 4000),
    "text": (32, 128),
}
LIMIT_S = 1800.0  # of a point


def main() -> None:
    """Measure all points, and write them."""
    parser = argparse.ArgumentParser(description="Scaling curves of a step.")
    parser.add_argument("--short", action="store_true", help="small sizes, two points a curve")
    parser.add_argument("--steps", type=int, default=3, help="of a point; the first warms up")
    parser.add_argument("--rounds", type=int, default=3, help="of the layouts of ranks")
    parser.add_argument("--only", nargs="+", choices=[*FULL, "ranks"], help="axes")
    parser.add_argument("--out", type=Path, default=Path("runs/curves"))
    args = parser.parse_args()
    base, axes = (SHORT, REDUCED) if args.short else (MID, FULL)
    found: dict[tuple[str, Any], list[dict[str, float]]] = {}
    for axis, value, load, (world, degrees) in points(base, axes, args):
        # Stages work at once on different micro-batches: the more, the shorter the bubble.
        size = 1 if "pp" in degrees else base.batch
        point = run_ranks(measure, (load, degrees, args.steps, size), world, timeout_s=LIMIT_S)
        found.setdefault((axis, value), []).append(point)
        seconds = f"{point['cpu_s']:.2f} CPU-s, {point['wall_s']:.2f} s"
        print(f"{axis} {value}: {seconds} a step, {point['peak_mib']:.0f} MiB", file=sys.stderr)
    rows = [
        {
            "axis": axis,
            "value": value,
            **{k: statistics.median(x[k] for x in again) for k in again[0]},
        }
        for (axis, value), again in found.items()
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "curves.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args.out / "curves.png")
    report({value: rounds for (axis, value), rounds in found.items() if axis == "ranks"})
    print(f"{args.out}/curves.csv and curves.png: {len(rows)} points")


def points(
    base: Workload, axes: dict[str, tuple[int, ...]], args: argparse.Namespace
) -> Iterator[tuple[str, Any, Workload, tuple[int, dict[str, int]]]]:
    """Axis, value, sizes and layout of every point; of ranks, as often as there are rounds."""
    only = args.only or [*axes, "ranks"]
    for axis, values in axes.items():
        for value in values if axis in only else ():
            yield axis, value, at(base, axis, value), (1, {})
    for _ in range(args.rounds if "ranks" in only else 0):
        for name, layout in LAYOUTS.items():
            yield "ranks", name, replace(base, batch=2 * base.batch), layout


def at(base: Workload, axis: str, value: int) -> Workload:
    """The sizes with one of them changed."""
    model, depth = base.model, len(base.codebook_sizes)
    if axis == "positions":
        side = round(value**0.5) * model.vision.patch_size
        return replace(base, model=replace(model, vision=replace(model.vision, image_size=side)))
    if axis == "codebook":
        return replace(base, codebook_sizes=(value,) * depth)
    if axis == "depth":
        return replace(base, codebook_sizes=base.codebook_sizes[:1] * value)
    if axis == "vocabulary":
        language = replace(model.language, vocab_size=value)
        return replace(base, model=replace(model, language=language))
    return replace(base, text=(value, value))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds and memory over every axis."""
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure, places = plt.subplots(
        1, len(axes), figsize=(4 * len(axes), 3.6), layout="constrained", squeeze=False
    )
    for place, axis in zip(places[0], axes, strict=True):
        own = [row for row in rows if row["axis"] == axis]
        values = [row["value"] for row in own]
        name = "cpu_s" if axis != "ranks" else "wall_s"
        place.plot(values, [row[name] for row in own], "o-", color="C0")
        place.set(xlabel=axis, title=f"{name} of a step (blue), peak MiB (orange)", ylim=(0, None))
        place.title.set_size(9)
        memory = place.twinx()
        memory.plot(values, [row["peak_mib"] for row in own], "s--", color="C1")
        memory.set_ylim(0, None)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def report(rounds: dict[str, list[dict[str, float]]]) -> None:
    """Print what several ranks gain, and how near two stages come to their bound."""
    if not rounds:
        return
    for kind in ("wall_s", "busiest_cpu_s"):
        one, data, tensor, stages = ([x[kind] for x in rounds[name]] for name in LAYOUTS)
        print(
            f"{kind}: 1 rank {spread(one)}, DP2 {spread(data)}, TP2 {spread(tensor)}, "
            f"PP2 {spread(stages)}"
        )
        print(f"  samples/s of TP2 over DP2: {spread(ratios(data, tensor))}")
    pipelines = rounds["pp2"]
    walls = [x["wall_s"] for x in pipelines]
    for name, bound in (("measured", measured_bound), ("modelled", modelled_bound)):
        bounds = [bound(x) for x in pipelines]
        print(
            f"PP2: bound by {name} work of its stages and the bubble {spread(bounds)}; "
            f"wall_s over it {spread(ratios(walls, bounds))}"
        )
    for name in ("imbalance", "idle", "micro_batches"):
        print(f"  {name} {pipelines[0][name]:.3g}")


def measured_bound(point: dict[str, float]) -> float:
    """Least seconds of a pipeline's step, from the CPU-seconds of its stages.

    The busiest stage works without a pause; before and after it one micro-batch passes through the
    others. A stage that waits takes no CPU time.
    """
    rest = point["cpu_s"] - point["busiest_cpu_s"]
    return point["busiest_cpu_s"] + rest / point["micro_batches"]


def modelled_bound(point: dict[str, float]) -> float:
    """The same with all stages' CPU-seconds split as the cost model says (parallel/stages.py)."""
    return point["cpu_s"] / point["ranks"] / (1 - point["idle"])


def ratios(above: list[float], below: list[float]) -> list[float]:
    """One over the other, round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: list[float]) -> str:
    """The median, and the lowest and highest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
