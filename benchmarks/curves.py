"""Scaling curves: what a step of training costs as one size of it grows, as CSV and PNG.

    python -m benchmarks.curves [--short] [--steps 3] [--only AXIS ...] [--out runs/curves]

Every point is a process of its own (several, for the axis of ranks) that trains some steps at the
sizes of `benchmarks.workload`, with one of them changed. CPU-seconds stand beside wall seconds,
which other processes on the machine lengthen. For two pipeline stages, what was measured stands
beside the least time that the modelled costs of the stages and the schedule's bubble allow.
"""

import argparse
import csv
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
    parser.add_argument("--only", nargs="+", choices=[*FULL, "ranks"], help="axes")
    parser.add_argument("--out", type=Path, default=Path("runs/curves"))
    args = parser.parse_args()
    base, axes = (SHORT, REDUCED) if args.short else (MID, FULL)
    rows = []
    for axis, value, load, (world, degrees) in points(base, axes, args.only or [*FULL, "ranks"]):
        found = run_ranks(measure, (load, degrees, args.steps), world, timeout_s=LIMIT_S)
        rows.append({"axis": axis, "value": value, **found})
        seconds = f"{found['cpu_s']:.2f} CPU-s, {found['wall_s']:.2f} s"
        print(f"{axis} {value}: {seconds} a step, {found['peak_mib']:.0f} MiB", file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "curves.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, args.out / "curves.png")
    report(rows)
    print(f"{args.out}/curves.csv and curves.png: {len(rows)} points")


def points(
    base: Workload, axes: dict[str, tuple[int, ...]], only: list[str]
) -> Iterator[tuple[str, Any, Workload, tuple[int, dict[str, int]]]]:
    """Axis, value, sizes and layout of every point."""
    for axis, values in axes.items():
        for value in values if axis in only else ():
            yield axis, value, at(base, axis, value), (1, {})
    for name, layout in LAYOUTS.items() if "ranks" in only else ():
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


def report(rows: list[dict[str, Any]]) -> None:
    """Print what several ranks gain, and the bound of two stages."""
    found = {row["value"]: row for row in rows if row["axis"] == "ranks"}
    if not found:
        return
    tensor, data, stages = (found[name] for name in ("tp2", "dp2", "pp2"))
    # A stage that waits takes no CPU time: only the largest one's share of the work counts there.
    shares = {"wall_s": 1 / (1 - stages["idle"]), "busiest_cpu_s": stages["imbalance"]}
    for kind, factor in shares.items():
        bound = found["1"][kind] / 2 * factor
        print(
            f"{kind}: TP2 {tensor[kind]:.2f}, DP2 {data[kind]:.2f} "
            f"(speed of TP2 over DP2 {data[kind] / tensor[kind]:.2f}); "
            f"PP2 {stages[kind]:.2f}, bound {bound:.2f} with imbalance "
            f"{stages['imbalance']:.3f} and idle {stages['idle']:.1%}"
        )


if __name__ == "__main__":
    main()
