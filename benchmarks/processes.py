"""The measured processes of `benchmarks.step`: weights and codes once, then either side.

A side's libraries are in memory before anything is measured, and only its own: the plain one's
process knows nothing of megatron-core.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.machine import copy_gb_per_s, matmul_gflops, memory_mib
from benchmarks.workload import WORKLOADS, Workload, samples, useful_flops

MIB = 2**20
Step = Callable[[int], list[float]]  # number of a step to its text and visual loss


def run(args: argparse.Namespace, watch: Any) -> None:
    """Be one process."""
    load = WORKLOADS["short" if args.short else "mid"]
    if args.side == "plain":
        from benchmarks import plain

        libraries_mib = memory_mib("VmRSS")
        step, static = plain.side(load, args, watch)
        measured = timed_steps(load, args, step, watch)
    else:
        from benchmarks import sides

        if args.side == "prepare":
            sides.prepare(load, args)
            return
        libraries_mib = memory_mib("VmRSS")
        with sides.one_rank() as groups:
            step, static = sides.ours(load, args, groups, watch)
            measured = timed_steps(load, args, step, watch)
    measured["static_mib"] = static() / MIB
    measured["above_mib"] = measured["peak_mib"] - libraries_mib - measured["static_mib"]
    (args.folder / f"{args.side}.json").write_text(json.dumps(measured))


def timed_steps(load: Workload, args: argparse.Namespace, step: Step, watch: Any) -> dict[str, Any]:
    """Time of every step by part, and the peak memory of all but the first."""
    steps = []
    for number in range(args.steps):
        watch.start()
        losses = step(number)
        watch.lap("optimizer")
        parts = watch.spent
        steps.append(
            {
                "losses": losses,
                "parts": parts,
                "wall_s": sum(part[0] for part in parts.values()),
                "cpu_s": sum(part[1] for part in parts.values()),
                "peak_mib": max(part[2] for part in parts.values()),
                "gflop": 1e-9 * sum(useful_flops(load, samples(load, number)).values()),
            }
        )
        steps[-1]["matmul_gflops"] = matmul_gflops(256 if args.short else 1536)
    peak = max(step["peak_mib"] for step in steps[1:])
    return {"steps": steps, "peak_mib": peak, "copy_gb_per_s": copy_gb_per_s()}


def tensor_bytes(tensors: list[Tensor]) -> float:
    """Bytes of the tensors together."""
    return float(sum(x.numel() * x.element_size() for x in tensors))


def state_bytes(optimizer: Any) -> float:
    """Bytes of an optimizer's state, and of the fp32 weights that it keeps beside bf16 ones."""
    inner = getattr(optimizer, "chained_optimizers", [optimizer])
    found = 0.0
    for one in inner:
        for masters in getattr(one, "shard_fp32_from_float16_groups", []):
            found += tensor_bytes([x for x in masters if x is not None])
        one = getattr(one, "optimizer", one)
        for values in one.state.values():
            found += tensor_bytes([x for x in values.values() if isinstance(x, Tensor)])
    return found
