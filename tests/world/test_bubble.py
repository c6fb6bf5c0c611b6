"""A run with pipeline stages tells how long each of them had nothing to do."""

import dataclasses
import itertools
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process)
from megatron_asvr.platforms.cpu import CpuPlatform

import pytest
import torch.distributed as dist

from megatron_asvr.launch.local import run_ranks
from megatron_asvr.parallel.collectives import gather_objects
from megatron_asvr.parallel.groups import initialize
from megatron_asvr.parallel.plan import make_plan
from megatron_asvr.train.metrics import Window, progress_line
from megatron_asvr.train.step import agree
from megatron_asvr.train.work import Work
from tests.run_cases import CODEBOOK_SIZES, Bench, config, step_batches

pytestmark = pytest.mark.world


def told(changes: dict[str, Any]) -> list[tuple[float, dict[str, float]]]:
    """Ticks in which each rank's passes ran, and what is logged of two steps of 16 ticks each.

    Each look at the clock is a tick, so a pass takes one: on any machine.
    """
    run = config(train__global_batch=8, model__language__num_layers=4, **changes)
    groups = initialize(make_plan(run, dist.get_world_size(), CODEBOOK_SIZES))
    bench, window, work = Bench(run, groups), Window(), Work(run, None, groups=groups)
    ticks = itertools.count()
    CpuPlatform.mark = lambda _: float(next(ticks))
    for number in range(2):
        batches = step_batches(run, number, groups)
        counts = agree(batches, stop=False, groups=groups, work=work.counts(batches))
        result = dataclasses.replace(bench.step(number), own_s=12.0, wait_s=4.0)
        # As if the stages had not the same work.
        more = dataclasses.replace(result, busy_s=result.busy_s + groups.pp_rank)
        window.add(more, counts, data_s=0.0, train_s=20.0)
    values = {**window.values(), **work.values(window)}
    return gather_objects((result.busy_s, values), group=groups.world)


@pytest.mark.parametrize("vpp", [None, 2], ids=["stages", "virtual"])
def test_every_pass_counts_once_and_the_rest_is_the_bubble(vpp: int | None) -> None:
    by_rank = run_ranks(told, ({"parallel__pp": 2, "parallel__vpp": vpp},), 2, timeout_s=120)
    passes = 2 * 4 * (vpp or 1)  # forward and back, of every micro-batch and chunk
    for busy_s, values in by_rank:
        assert busy_s == passes
        stages = [1 - passes / 16, 1 - (passes + 1) / 16]
        assert [values["bubble_0"], values["bubble_1"]] == pytest.approx(stages)
        assert values["bubble"] == pytest.approx(sum(stages) / 2)
        assert values["rank_wait"] == pytest.approx(0.2)
    line = progress_line({**values, "lr": 0.0}, step=2, total_steps=2)
    assert f" bubble {values['bubble']:.0%}" in line
