"""Bytes of tensors that training really has at once, against the plan's."""

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron)

import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from megatron_asvr.batch import MicroBatch
from megatron_asvr.config.load import load
from megatron_asvr.config.schema import Config
from megatron_asvr.parallel.collectives import gather_objects
from megatron_asvr.parallel.groups import initialize
from megatron_asvr.parallel.plan import make_plan
from megatron_asvr.planner.memory import plan_memory
from megatron_asvr.planner.rehearsal import Shape
from tests import run_cases

CODES = (64,) * 4  # of the quick start's tokenizer
LARGER: dict[str, int] = {  # ten times the quick start's parameters
    "model.language.hidden_size": 192,
    "model.language.num_layers": 9,
    "model.language.ffn_hidden_size": 512,
    "model.visual_head.width": 160,
}
WITHIN = 0.1  # of the measured peak


def quick_start(sizes: dict[str, int], degrees: dict[str, Any]) -> Config:
    """Stage 2 of the quick start with some other sizes; a step has two of its micro-batches."""
    words = [f"{name}={value}" for name, value in sizes.items()]
    words += [f"parallel.{name}={value}" for name, value in degrees.items()]
    words += ["train.global_batch=16", "train.steps=4"]
    return load("examples/quickstart/stage2.yaml", words)


@contextlib.contextmanager
def as_large(run: Config) -> Iterator[None]:
    """Inside, ``run_cases`` makes the tokenizer and the rows of the quick start."""
    before = run_cases.CODEBOOK_SIZES, run_cases.LENGTH
    run_cases.CODEBOOK_SIZES, run_cases.LENGTH = CODES, 2 * run.model.vision.num_patches
    try:
        yield
    finally:
        run_cases.CODEBOOK_SIZES, run_cases.LENGTH = before


def batches(run: Config) -> list[MicroBatch]:
    """The micro-batches of a step, all of one shape."""
    number = run.train.global_batch // run.train.micro_batch
    return [
        run_cases.micro_batch(run, seed, images=(1,) * run.train.micro_batch)
        for seed in range(number)
    ]


def planned(sizes: dict[str, int], degrees: dict[str, Any], world: int) -> list[int]:
    """Planned peak of every rank's stage, in bytes; before this process is in a world."""
    run = quick_start(sizes, degrees)
    with as_large(run):
        first, codes = batches(run)[0], run_cases.tokenizer(run.model.vision).config
    rows, length = first.tokens_BS.shape
    shape = Shape(
        rows=rows,
        length=length,
        images=first.num_images,
        texts=first.num_text_targets,
        codes=first.num_visual_targets,
    )
    found = plan_memory(run, world, codes, shape=shape, layers="cpu")
    return [rank.peak for rank in found for _ in range(rank.ranks)]


def measured(sizes: dict[str, int], degrees: dict[str, Any]) -> list[int]:
    """Most bytes of tensors on every rank, from building the model to the end of two steps.

    They are those of torch's allocator: all tensors, and nothing else of the process.
    """
    run = quick_start(sizes, degrees)
    groups = initialize(make_plan(run, dist.get_world_size(), CODES))
    with as_large(run):
        whole = batches(run)
        share = len(whole) // groups.plan.dp
        own = whole[groups.dp_rank * share : (groups.dp_rank + 1) * share]
        views = [run_cases.view_of(batch, groups) for batch in own]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            bench = run_cases.Bench(run, groups)
            for chunk in bench.chunks:
                chunk.leave_out_unused()
            for step in range(2):
                bench.step(step, views)
    return gather_objects(highest(recorded), group=groups.world)


def highest(recorded: profile) -> int:
    """Most bytes that were allocated, and not freed, at any time of a recording.

    What a thread of gloo frees is not recorded: that is known when the memory is used again.
    """
    found, left = [], [*recorded.profiler.kineto_results.experimental_event_tree()]
    while left:
        event = left.pop()
        left += event.children
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    live: dict[int, int] = {}
    now = most = 0
    for _, place, size in sorted(found):
        now -= live.pop(place, 0)
        if size > 0:
            live[place] = size
            now += size
        most = max(most, now)
    return most
