"""A training step against a plain implementation (`benchmarks.plain`), and the machine's limit.

    python -m benchmarks.step [--short] [--pairs 5] [--steps 4] [--precision fp32] [--no-kernels]

Both sides train the same model on the same samples from the same weights, in processes of their
own, one after the other in every pair; the order changes from pair to pair. The first step warms
up: its losses are compared (1e-5 in fp32, 1e-3 in bf16), its time is not counted. Peak memory is
that of the steps after the first. A step is forward, backward, clipping and AdamW. All figures are
of one thread; CPU time stands beside wall time, which other processes on the machine lengthen.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import memory_mib, reset_peak

TOLERANCE = {"fp32": 1e-5, "split": 1e-5, "bf16": 1e-3}


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
    parser.add_argument("--short", action="store_true", help="small sizes, one pair")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--steps", type=int, default=4, help="of a process; the first warms up")
    parser.add_argument("--precision", choices=tuple(TOLERANCE), default="fp32", help="of ours")
    parser.add_argument("--json", type=Path, help="write all measurements here")
    parser.add_argument("--recompute", action="store_true", help="recompute our visual head")
    parser.add_argument("--no-kernels", action="store_true", help="ours by torch alone")
    parser.add_argument("--side", choices=("prepare", "ours", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        from benchmarks import sides

        torch.set_num_threads(1)
        sides.run(args, Stopwatch())
        return
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        results = measure(args)
    report(args, results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What every process of every pair measured."""
    call(args, "prepare")
    results = []
    for pair in range(args.pairs or (1 if args.short else 5)):
        for side in ("plain", "ours") if pair % 2 == 0 else ("ours", "plain"):
            call(args, side)
            result = json.loads((args.folder / f"{side}.json").read_text())
            results.append({"pair": pair, "side": side, **result})
            wall = statistics.median(step["wall_s"] for step in result["steps"][1:])
            print(f"pair {pair} {side}: {wall:.2f} s a step", file=sys.stderr)
    return results


def call(args: argparse.Namespace, side: str) -> None:
    """Run one process to its end."""
    command = [sys.executable, "-m", "benchmarks.step", "--side", side]
    command += ["--folder", str(args.folder), "--steps", str(args.steps)]
    command += ["--precision", args.precision]
    command += ["--short"] * args.short + ["--recompute"] * args.recompute
    command += ["--no-kernels"] * args.no_kernels
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ASVR_PLATFORM": "cpu"}
    subprocess.run(command, check=True, env=environment)


def report(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Print the comparison.

    Raises:
        SystemExit: the two sides do not compute the same losses.
    """
    sides = {side: [r for r in results if r["side"] == side] for side in ("plain", "ours")}
    worst = max(
        abs(a - b) / max(1.0, abs(b))
        for ours, plain in zip(sides["ours"], sides["plain"], strict=True)
        for a, b in zip(ours["steps"][0]["losses"], plain["steps"][0]["losses"], strict=True)
    )
    names = list(dict.fromkeys(n for r in results for s in r["steps"] for n in s["parts"]))
    print(f"{'':34s} {'CPU-seconds':>17s} {'peak MiB':>17s}")
    print(f"{'part of a step':34s}" + 2 * f" {'plain':>8s} {'ours':>8s}")
    for name in names:
        values = {
            (side, k): statistics.median(
                s["parts"].get(name, [0.0, 0.0, 0.0])[k]
                for r in sides[side]
                for s in r["steps"][1:]
            )
            for k in (1, 2)
            for side in sides
        }
        seconds, peaks = ([values[side, k] for side in sides] for k in (1, 2))
        print(f"{name:34s}" + "".join(f" {x:8.3f}" for x in seconds), end="")
        print("".join(f" {x:8.0f}" for x in peaks))
    for kind in ("cpu_s", "wall_s"):
        lines = {side: per_pair(sides[side], kind) for side in sides}
        ratios = [p / o for p, o in zip(lines["plain"], lines["ours"], strict=True)]
        text = "  ".join(f"{side} {spread(lines[side])}" for side in sides)
        print(f"{kind} of a step: {text}  plain / ours {spread(ratios)}")
    for name in ("peak_mib", "above_mib"):
        values = {side: statistics.median(r[name] for r in sides[side]) for side in sides}
        print(
            f"{name}: plain {values['plain']:.0f}  ours {values['ours']:.0f}  "
            f"ours / plain {values['ours'] / values['plain']:.3f}"
        )
    for side in sides:
        rates = [
            s["gflop"] / s["cpu_s"] / s["matmul_gflops"]
            for r in sides[side]
            for s in r["steps"][1:]
        ]
        print(f"{side}: useful GFLOP/s over the matmul rate {spread(rates)}")
    matmul = [s["matmul_gflops"] for r in results for s in r["steps"]]
    copies = [r["copy_gb_per_s"] for r in results]
    print(f"fp32 matmul GFLOP/s {spread(matmul)}  copy GB/s {spread(copies)}")
    print(f"losses differ by at most {worst:.1e}")
    if worst > TOLERANCE[args.precision]:
        raise SystemExit(f"the losses differ by {worst:.1e}, above {TOLERANCE[args.precision]:g}")


def per_pair(results: list[dict[str, Any]], kind: str) -> list[float]:
    """Mean step of each process: all of its samples count, also the ones without an image."""
    return [statistics.mean(step[kind] for step in r["steps"][1:]) for r in results]


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


if __name__ == "__main__":
    main()
