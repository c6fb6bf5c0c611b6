"""How fast images come, and how long a training step waits for its data.

DALI's CPU path and the PIL reference decode and resize the same images in the same process, in
turns, one thread each. The waiting is what a finished quick start logged. Run `make bench`, or
`python -m benchmarks.images`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_asvr.config.load import from_dict
from megatron_asvr.data import pil
from megatron_asvr.data.decode import Decoder
from megatron_asvr.data.gate import Fit
from tools.make_dirty_images import encode, picture

Times = tuple[float, float]  # seconds of wall time and of CPU time

SIDE = 384  # pixels, of the encoder
WAIT_LIMIT = 0.02  # of a step
SIZES = ((640, 480), (480, 640), (1024, 768), (500, 375))  # width, height: photographs of the web


def photographs(number: int) -> list[bytes]:
    """JPEG files of usual sizes."""
    generator = np.random.default_rng(0)
    made = [picture(generator, *SIZES[k % len(SIZES)]) for k in range(number)]
    return [encode(image, "JPEG", quality=85) for image in made]


def measure(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[Times]]:
    """Times of every repeat of every way; they take turns, and the first round does not count."""
    times: dict[str, list[Times]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, run in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if repeat:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def compare_decoders(fit: Fit, number: int, repeats: int) -> None:
    """Print images a second of DALI and of PIL, and the median ratio of a round."""
    encoded = photographs(number)
    config = from_dict({"model": {"vision": {"image_size": SIDE}}, "data": {"image_fit": fit}})
    decoder = Decoder(config, torch.device("cpu"))
    ways = {
        "DALI": lambda: decoder.dali.views(encoded),
        "PIL": lambda: [pil.decode(x, image_size=SIDE, fit=fit) for x in encoded],
    }
    times = measure(ways, repeats)
    print(f"image_fit={fit}, to {SIDE} pixels: {number} JPEG files, {repeats} rounds, one thread")
    for unit, clock in (("wall", 0), ("CPU", 1)):
        for name, rounds in times.items():
            rates = sorted(number / seconds[clock] for seconds in rounds)
            middle = statistics.median(rates)
            spread = f"{rates[0]:.1f} to {rates[-1]:.1f}"
            print(f"  {name:4} {middle:6.1f} images a second of {unit} time, median; {spread}")
        pairs = zip(times["DALI"], times["PIL"], strict=True)
        ratios = sorted(theirs[clock] / dali[clock] for dali, theirs in pairs)
        print(
            f"  DALI is {statistics.median(ratios):.2f} times as fast, median of the rounds; "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        )


def waiting(run: Path) -> tuple[float, float] | None:
    """Share of the steps' time spent waiting for data: of all logged steps, and after the first.

    Args:
        run: a run's folder.
    """
    if not (run / "metrics.jsonl").exists():
        return None
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    steps = [line for line in lines if line["kind"] == "train"]
    shares = []
    for part in (steps, steps[1:]):
        total = sum(line["step_s"] for line in part)
        shares.append(sum(line["step_s"] * line["data_wait"] for line in part) / max(total, 1e-9))
    return shares[0], shares[1]


def main() -> int:
    """Exit status: 1 when the quick start's second stage waited longer than ``WAIT_LIMIT``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="few images, the short quick start")
    short = parser.parse_args().short
    for fit in ("square", "pad"):
        compare_decoders(fit, *((16, 3) if short else (64, 9)))
    folder = Path("runs/quickstart-short" if short else "runs/quickstart")
    late = False
    for stage in ("warmup", "stage1", "stage2"):
        found = waiting(folder / stage)
        if found is None:
            print(f"waiting for data: {folder / stage} is not there; run `make {folder.name}`")
            continue
        print(
            f"waiting for data, {folder / stage}: {found[0]:.2%} of the steps' time, "
            f"{found[1]:.2%} after the first logged window"
        )
        late |= stage == "stage2" and not short and found[0] > WAIT_LIMIT
    return int(late)


if __name__ == "__main__":
    sys.exit(main())
