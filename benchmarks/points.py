"""One point of `benchmarks.curves`: some steps of training at one size, on one or several ranks."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process)

import torch
import torch.distributed as dist

from benchmarks.machine import memory_mib, reset_peak
from benchmarks.sides import micro_batch, packed
from benchmarks.workload import Sample, Workload, samples, useful_flops
from megatron_asvr.batch import MicroBatch, image_share
from megatron_asvr.config.schema import ParallelConfig
from megatron_asvr.data.plan import deal_by_cost
from megatron_asvr.model.asvr import build_chunks
from megatron_asvr.model.tokenizer import TokenizerConfig, VisualTokenizer
from megatron_asvr.parallel.collectives import gather_objects
from megatron_asvr.parallel.groups import Groups, initialize
from megatron_asvr.parallel.plan import make_plan
from megatron_asvr.parallel.stages import layer_split
from megatron_asvr.train.optim import make_optimizer, wrap
from megatron_asvr.train.step import agree, loss_function, train_step


def measure(load: Workload, degrees: Mapping[str, int], steps: int, size: int) -> dict[str, float]:
    """What a step costs: medians of all but the first, which warms up; sums over ranks.

    A micro-batch is one packed row without padding, as in `benchmarks.step`; pipeline stages send
    one another rows of one length instead.

    Args:
        load: sizes.
        degrees: of ``parallel``; the other ranks are data parallel.
        steps: how many.
        size: samples of a micro-batch.
    """
    config = load.config("fp32")
    config = replace(
        config,
        parallel=ParallelConfig(**degrees),
        train=replace(config.train, micro_batch=size),
    )
    groups = initialize(make_plan(config, dist.get_world_size(), load.codebook_sizes))
    chunks = build_chunks(config, groups=groups, tokenizer=_tokenizer(load))
    wrapped = wrap(chunks, config.train.optim)
    optimizer = make_optimizer(wrapped, config.train)
    spent: list[tuple[float, ...]] = []
    for number in range(steps):
        made = samples(load, number)
        mine = _dealt(load, made, groups)
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        # Pipeline stages send one another tensors of one size.
        length = max(_length(load, x) for x in made) if groups.plan.pp > 1 else None
        torch.manual_seed(number)  # codes: the same on all ranks that share a micro-batch
        batches = [_batch(load, part, length, groups) for part in parts]
        reset_peak()
        dist.barrier()
        before = time.perf_counter(), time.process_time()
        agreement = agree(batches, stop=False, groups=groups)
        loss = loss_function(config.loss, agreement, num_micro_batches=len(batches))
        result = train_step(wrapped, optimizer, batches, loss, step=number, groups=groups)
        dist.barrier()
        after = time.perf_counter(), time.process_time()
        flops = sum(useful_flops(load, made).values())
        own = (*(b - a for a, b in zip(before, after, strict=True)), memory_mib("VmHWM"))
        spent.append((*own, 1e-9 * flops, result.loss))
    ranks = gather_objects(spent[1:], group=groups.world)
    wall, cpu, peak, gflop = (
        [statistics.median(step[k] for step in rank) for rank in ranks] for k in range(4)
    )
    split = layer_split(config, load.codebook_sizes)
    return {
        "ranks": groups.plan.world,
        "wall_s": max(wall),
        "cpu_s": sum(cpu),
        "busiest_cpu_s": max(cpu),
        "peak_mib": max(peak),
        "useful_gflop": gflop[0],
        "imbalance": split.imbalance,
        "idle": split.idle(len(batches)),
        "micro_batches": len(batches),
    }


def _tokenizer(load: Workload) -> VisualTokenizer:
    """Codebooks of the right sizes; codes are drawn, as a cache would bring them."""
    vision = load.model.vision
    made = VisualTokenizer(
        TokenizerConfig(
            kind="semantic",
            vision=replace(vision, num_layers=1, feature_layer=0),
            feature_layer=0,
            codebook_sizes=load.codebook_sizes,
        )
    )
    generator = torch.Generator().manual_seed(0)
    made.set_codebooks(
        [torch.randn(size, made.width, generator=generator) for size in load.codebook_sizes]
    )
    return made


def _dealt(load: Workload, made: list[Sample], groups: Groups) -> list[Sample]:
    """This rank's samples, as the loader deals them: as many to each, even by cost."""
    costs = [sum(useful_flops(load, [sample]).values()) for sample in made]
    parts = deal_by_cost(costs, groups.plan.dp, capacity=len(made) // groups.plan.dp)
    return [made[i] for i in sorted(parts[groups.dp_rank])]


def _length(load: Workload, sample: Sample) -> int:
    return len(sample.tokens) + (sample.pixels_CHW is not None) * load.model.vision.num_patches


def _batch(load: Workload, part: list[Sample], length: int | None, groups: Groups) -> MicroBatch:
    """A micro-batch, packed unless its rows have a length, with this rank's share of its images."""
    images = sum(sample.pixels_CHW is not None for sample in part)
    shape = (images * load.model.vision.num_patches,)
    codes_PD = torch.stack([torch.randint(size, shape) for size in load.codebook_sizes], 1)
    batch = micro_batch(load, part, codes_PD, length=length or 0)
    batch = batch if length else packed(batch)
    start, end = share = image_share(images, groups.tp_rank, groups.plan.tp)
    pixels = batch.pixel_values_ICHW[start:end] if end > start else None
    return replace(batch, image_share=share, pixel_values_ICHW=pixels)
