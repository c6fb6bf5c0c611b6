"""How many sequences packing needs, beside the best lower bound and beside padding.

A global batch of 256 samples is packed by itself, as in a run. The bound is that of Gilmore and
Gomory's linear program over all ways to fill a sequence: no plan, however clever, needs fewer. Run
`make bench`, or `python -m benchmarks.packing`.
"""

import argparse
import sys
import time

import numpy as np

from benchmarks.lengths import llava_lengths
from megatron_asvr.data.packing import best_fill, first_fit, pack

SAMPLES = 256  # of a global batch
LIMIT = 1.03  # times the lower bound, over all batches of a row
ITERATIONS = 3000  # of the bound, which is valid after any number of them


def lower_bound(lengths: list[int], capacity: int, *, enough: int) -> int:
    """Sequences that every plan needs: the linear program's optimum, rounded up.

    The simplex method with columns made on demand: a column is a way to fill a sequence, and the
    best new one is a knapsack problem in the present prices. Prices divided by the value of
    that knapsack are feasible for the dual, so every iteration gives a bound.

    Args:
        lengths: of the documents.
        capacity: positions of a sequence.
        enough: sequences of a plan; a bound as high proves it the best, and the search ends.

    Source: Gilmore and Gomory, A linear programming approach to the cutting-stock problem, 1961;
    Farley, A note on bounding a class of linear programming problems, 1990.
    """
    sizes, demand = np.unique(np.array(lengths), return_counts=True)
    sizes, demand = sizes[::-1], demand[::-1].astype(float)
    inverse = np.eye(len(sizes))  # of the basis: each size alone in a sequence
    amounts = demand.copy()
    best = -(-sum(lengths) // capacity)
    for _ in range(ITERATIONS if best < enough else 0):
        prices = inverse.sum(0)
        column, value = _knapsack(sizes, demand, np.maximum(prices, 0.0), capacity)
        bound = float(np.maximum(prices, 0.0) @ demand) / max(value, 1.0)
        best = max(best, int(np.ceil(bound - 1e-6)))
        if value < 1 + 1e-9 or best >= min(enough, np.ceil(amounts.sum() - 1e-6)):
            break
        entering = inverse @ column
        ratios = np.where(entering > 1e-9, amounts / np.maximum(entering, 1e-9), np.inf)
        row = int(ratios.argmin())
        pivot = inverse[row] / entering[row]
        step = ratios[row]
        amounts -= step * entering
        amounts[row] = step
        inverse -= np.outer(entering, pivot)
        inverse[row] = pivot
    return best


def _knapsack(
    sizes: np.ndarray, demand: np.ndarray, prices: np.ndarray, capacity: int
) -> tuple[np.ndarray, float]:
    """The most valuable way to fill a sequence, with no size more often than it is asked for."""
    value = np.zeros(capacity + 1)
    taken, kinds = [], []
    for kind, (size, often) in enumerate(zip(sizes.tolist(), demand, strict=True)):
        for _ in range(min(int(often), capacity // size) if prices[kind] > 1e-12 else 0):
            better = np.zeros(capacity + 1, dtype=bool)
            candidate = value[:-size] + prices[kind]
            better[size:] = candidate > value[size:] + 1e-12
            value[size:] = np.where(better[size:], candidate, value[size:])
            taken.append(better)
            kinds.append(kind)
    column, place = np.zeros(len(sizes)), capacity
    for better, kind in zip(reversed(taken), reversed(kinds), strict=True):
        if better[place]:
            column[kind] += 1
            place -= int(sizes[kind])
    return column, float(value[capacity])


def row(patches: int, capacity: int, batches: int) -> tuple[str, float]:
    """A line of the table, and sequences over the lower bound."""
    totals = {"packed": 0, "bound": 0, "ffd": 0, "fill": 0}
    positions, worst, took_s = 0, 0.0, 0.0
    for seed in range(batches):
        lengths = llava_lengths(SAMPLES, patches=patches, max_length=2048, seed=seed)
        start = time.process_time()
        packed = len(pack(lengths, capacity, seed))
        took_s += time.process_time() - start
        bound = lower_bound(lengths, capacity, enough=packed)
        longest = sorted(range(SAMPLES), key=lambda i: -lengths[i])
        totals["ffd"] += len(first_fit(lengths, capacity, longest))
        totals["fill"] += len(best_fill(lengths, capacity, longest))
        totals["packed"] += packed
        totals["bound"] += bound
        positions += sum(lengths)
        worst = max(worst, packed / bound)
    ratio = totals["packed"] / totals["bound"]
    each = batches * SAMPLES
    return (
        f"{patches:7} {capacity:8,} {totals['bound']:6} {totals['packed']:9} {ratio:6.4f} "
        f"{worst:6.4f} {totals['ffd'] / totals['bound']:9.4f} "
        f"{totals['fill'] / totals['bound']:9.4f} {positions / totals['packed'] / capacity:7.1%} "
        f"{positions / each / 2048:7.1%} {1e3 * took_s / batches:8.1f}"
    ), ratio


def main() -> int:
    """Exit status: 1 when packing needs more than ``LIMIT`` times the lower bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=8, help="global batches of each row")
    batches = parser.parse_args().batches
    print(f"packing {batches} global batches of {SAMPLES} samples (benchmarks/lengths.py)")
    print(
        "patches capacity  bound sequences  ratio  worst first-fit best-fill    used  padded  "
        "CPU ms"
    )
    ratios = []
    for patches in (729, 576):
        for capacity in (2048, 4096, 16384):
            line, ratio = row(patches, capacity, batches)
            print(line, flush=True)
            ratios.append(ratio)
    print(
        "bound: sequences that any plan needs; ratio: sequences over bound, worst: of one batch; "
        "first-fit, best-fill: ratio of each method alone; used: share of positions that are no "
        "padding; padded: the same with one sample a row, padded to 2,048"
    )
    print(f"largest ratio {max(ratios):.4f}, limit {LIMIT}")
    return int(max(ratios) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
