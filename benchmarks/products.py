"""Rates of the products of one output layer on the CPU, in the ways that a step can make them.

    python -m benchmarks.products [--short]

GFLOP/s of one thread, the best of several calls in turn, for 16,384 codewords and a width of 512:
logits, the gradient of the input, and that of the weights, which is added to what is there. Of fp32
matrices, of bf16 ones as `megatron_asvr/precision/matmul.py` multiplies them, and of bf16 ones by
torch, whose results are rounded and then copied or added.
"""

import argparse
import time
from collections.abc import Callable

from megatron_asvr.platforms import select

import torch
from torch import Tensor

from megatron_asvr.precision.matmul import add_product


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Rates of an output layer's products.")
    parser.add_argument("--short", action="store_true", help="small sizes")
    short = parser.parse_args().short
    select()[0].per_rank(1)
    codewords, width = (512, 64) if short else (16384, 512)
    for rows in (32,) if short else (256, 512, 2048):
        _print(rows, codewords, width, rounds=2 if short else 7)


def _print(rows: int, codewords: int, width: int, *, rounds: int) -> None:
    """Rates for one number of rows."""
    x, weight, grad = (
        torch.randn(shape) for shape in ((rows, width), (codewords, width), (rows, codewords))
    )
    memory = tuple(torch.zeros(y.shape) for y in (grad, x, weight))
    bf16 = tuple(y.bfloat16() for y in (x, weight, grad))
    ways = {
        "fp32": _products((x, weight, grad), memory),
        "bf16 added in fp32": _products(bf16, memory),
        "bf16 by torch": _by_torch(bf16, memory),
    }
    flop = 2.0 * rows * codewords * width
    spent = {name: [float("inf")] * 3 for name in ways}
    for _ in range(rounds):
        for name, calls in ways.items():
            for k, call in enumerate(calls):
                spent[name][k] = min(spent[name][k], _seconds(call))
    print(f"{rows} rows, GFLOP/s       logits  input's gradient  weights' gradient")
    for name, seconds in spent.items():
        print(f"{name:20s}" + "".join(f" {1e-9 * flop / s:13.0f}" for s in seconds))


def _products(operands: tuple[Tensor, ...], memory: tuple[Tensor, ...]) -> list[Callable[[], None]]:
    """The three products of ``add_product``."""
    x, weight, grad = operands
    return [
        lambda: add_product(memory[0], x, weight.T, keep=0.0),
        lambda: add_product(memory[1], grad, weight, keep=0.0),
        lambda: add_product(memory[2], grad.T, x),
    ]


def _by_torch(
    operands: tuple[Tensor, ...], memory: tuple[Tensor, ...]
) -> list[Callable[[], object]]:
    """The same of bf16 matrices by torch."""
    x, weight, grad = operands
    return [
        lambda: memory[0].copy_(x @ weight.T),
        lambda: memory[1].copy_(grad @ weight),
        lambda: memory[2].add_(grad.T @ x),
    ]


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    main()
