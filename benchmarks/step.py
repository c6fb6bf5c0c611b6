"""A training step against a plain implementation (`benchmarks.plain`), and the machine's limit.

    python -m benchmarks.step [--short] [--rounds 5] [--steps 5] [--ways torch,bf16] [--json FILE]

All sides train the same model on the same samples from the same weights, in processes of their
own, one after the other in every round; the order changes from round to round. Ours run in one or
more ways: by torch alone (fp32), with the C++ kernels (fp32, as a run does by default), or in bf16,
with kernels. The first step warms up: its losses are compared (1e-5 in fp32, 1e-3 in bf16; ten
times that for the norm of the gradients), its time is not counted. Peak memory is that of the steps
after the first. A step is forward, backward, clipping and AdamW. All figures are of one thread; CPU
time stands beside wall time, which other processes on the machine lengthen.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import memory_mib, reset_peak

TOLERANCE = {"torch": 1e-5, "kernels": 1e-5, "bf16": 1e-3}  # of ways


class Stopwatch:
    """Seconds of wall and CPU time, and peak memory (MiB), of each part of a step."""

    def __init__(self) -> None:
        self.spent: dict[str, list[float]] = {}
        self._mark = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def start(self) -> None:
        """Forget what was measured; the next lap begins."""
        reset_peak()
        self.spent, self._mark = {}, self._now()

    def lap(self, name: str) -> None:
        """What passed since the last lap or part belongs to ``name``."""
        now = self._now()
        spent = self.spent.setdefault(name, [0.0, 0.0, 0.0])
        for k in range(2):
            spent[k] += now[k] - self._mark[k]
        spent[2] = max(spent[2], memory_mib("VmHWM"))
        reset_peak()
        self._mark = self._now()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What passes inside belongs to ``name``; what came before to the rest of the forward."""
        self.lap("other, forward")
        yield
        self.lap(name)


def main() -> None:
    """Measure, or be one of the measured processes."""
    parser = argparse.ArgumentParser(description="A step against a plain implementation.")
    parser.add_argument("--short", action="store_true", help="small sizes, one round")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--steps", type=int, default=5, help="of a process; the first warms up")
    parser.add_argument(
        "--ways", type=ways, default=list(TOLERANCE), help=f"of {','.join(TOLERANCE)}; all"
    )
    parser.add_argument("--json", type=Path, help="write all measurements here")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        from benchmarks import processes

        torch.set_num_threads(1)
        processes.run(args, Stopwatch())
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        results = measure(args)
    report(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def ways(text: str) -> list[str]:
    """Ways of ours from the command line.

    Raises:
        argparse.ArgumentTypeError: one is unknown.
    """
    names = text.split(",")
    if unknown := set(names) - set(TOLERANCE):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: use {', '.join(TOLERANCE)}")
    return names


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What every process of every round measured."""
    call(args, "prepare")
    results = []
    for number in range(args.rounds or (1 if args.short else 5)):
        sides = ["plain", *args.ways]
        for side in sides if number % 2 == 0 else reversed(sides):
            call(args, side)
            result = json.loads((args.folder / f"{side}.json").read_text())
            results.append({"round": number, "side": side, **result})
            wall = statistics.median(step["wall_s"] for step in result["steps"][1:])
            print(f"round {number} {side}: {wall:.2f} s a step", file=sys.stderr)
    return results


def call(args: argparse.Namespace, side: str) -> None:
    """Run one process to its end."""
    command = [sys.executable, "-m", "benchmarks.step", "--side", side]
    command += ["--folder", str(args.folder), "--steps", str(args.steps)]
    command += ["--short"] * args.short
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ASVR_PLATFORM": "cpu"}
    subprocess.run(command, check=True, env=environment)


def report(results: list[dict[str, Any]]) -> None:
    """Print the comparison.

    Raises:
        SystemExit: the sides do not compute the same losses.
    """
    sides: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(results, key=lambda result: result["round"]):
        sides.setdefault(result["side"], []).append(result)
    sides = {"plain": sides.pop("plain"), **{way: sides[way] for way in TOLERANCE if way in sides}}
    for title, k in (("CPU-seconds of a part", 1), ("peak MiB of a part", 2)):
        _print_parts(title, k, sides)
    print(f"{'whole steps':34s}" + "".join(f" {side:>24s}" for side in sides))
    for kind in ("cpu_s", "wall_s"):
        lines = {side: per_round(found, kind) for side, found in sides.items()}
        _print(f"{kind} of a step", map(spread, lines.values()))
        shares = (
            spread([p / o for p, o in zip(lines["plain"], line, strict=True)])
            for line in lines.values()
        )
        _print(f"plain / ours of {kind}", shares)
    for name in ("peak_mib", "above_mib"):
        values = [statistics.median(r[name] for r in found) for found in sides.values()]
        _print(name, (f"{value:.0f}" for value in values))
        _print(f"ours / plain of {name}", (f"{value / values[0]:.3f}" for value in values))
    rates = (
        [
            s["gflop"] / s["cpu_s"] / s["matmul_gflops"]
            for result in found
            for s in result["steps"][1:]
        ]
        for found in sides.values()
    )
    _print("useful over the fp32 matmul rate", map(spread, rates))
    matmul = [s["matmul_gflops"] for result in results for s in result["steps"]]
    copies = [result["copy_gb_per_s"] for result in results]
    amx = "has" if torch.cpu._is_amx_tile_supported() else "has no"
    print(f"fp32 matmul GFLOP/s {spread(matmul)}  copy GB/s {spread(copies)}  the CPU {amx} amx")
    far = {way: furthest(found, sides["plain"]) for way, found in sides.items()}
    for place, name in enumerate(("losses", "norm of the gradients")):
        _print(f"difference, {name}", (f"{x[place]:.1e}" for x in far.values()))
    del far["plain"]
    wrong = [way for way, (x, norm) in far.items() if not max(x, norm / 10) <= TOLERANCE[way]]
    if wrong:
        raise SystemExit(f"that is too much: {', '.join(wrong)}")


def _print(title: str, values: Iterable[str]) -> None:
    print(f"{title:34s}" + "".join(f" {value:>24s}" for value in values))


def _print_parts(title: str, k: int, sides: dict[str, list[dict[str, Any]]]) -> None:
    """Medians of the k-th figure of each part of a step."""
    every = [s["parts"] for found in sides.values() for result in found for s in result["steps"]]
    print(f"{title:34s}" + "".join(f" {side:>9s}" for side in sides))
    for name in dict.fromkeys(name for parts in every for name in parts):
        values = (
            statistics.median(
                s["parts"].get(name, [0.0, 0.0, 0.0])[k]
                for result in found
                for s in result["steps"][1:]
            )
            for found in sides.values()
        )
        print(f"{name:34s}" + "".join(f" {x:9.{3 if k < 2 else 0}f}" for x in values))


def furthest(ours: list[dict[str, Any]], plain: list[dict[str, Any]]) -> tuple[float, float]:
    """The largest relative difference in the first steps: of losses, and of the gradient norm."""
    pairs = zip(ours, plain, strict=True)
    steps = [(one["steps"][0]["losses"], other["steps"][0]["losses"]) for one, other in pairs]
    text, visual, norm = (
        max(abs(a[k] - b[k]) / max(1.0, abs(b[k])) for a, b in steps) for k in range(3)
    )
    return max(text, visual), norm


def per_round(results: list[dict[str, Any]], kind: str) -> list[float]:
    """Mean step of each process: all of its samples count, also the ones without an image."""
    return [statistics.mean(step[kind] for step in r["steps"][1:]) for r in results]


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


if __name__ == "__main__":
    main()
