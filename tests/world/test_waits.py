"""A step of several ranks makes the host of a GPU wait at the same few places."""

from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process)

import pytest
import torch.distributed as dist

from megatron_asvr.launch.local import run_ranks
from megatron_asvr.parallel.collectives import gather_objects
from megatron_asvr.parallel.groups import initialize
from megatron_asvr.parallel.plan import make_plan
from megatron_asvr.train.step import train_step
from tests.run_cases import CODEBOOK_SIZES, Bench, config, step_batches
from tests.syncs import KNOWN, Waits

pytestmark = pytest.mark.world


def waits(changes: dict[str, Any]) -> list[dict[str, int]]:
    """Of every rank, in a second step."""
    run = config(train__global_batch=8, train__micro_batch=2, **changes)
    groups = initialize(make_plan(run, dist.get_world_size(), CODEBOOK_SIZES))
    bench = Bench(run, groups)
    batches = step_batches(run, 0, groups)
    loss = bench.loss(batches)
    bench.step(0)
    with Waits() as found:
        train_step(bench.wrapped, bench.optimizer, batches, loss, step=1, groups=groups)
    return gather_objects(dict(found.places), group=groups.world)


@pytest.mark.parametrize(
    "changes",
    [{"parallel__tp": 2, "parallel__sp": True}, {"parallel__pp": 2}],
    ids=["tensors", "stages"],
)
def test_a_step_waits_for_the_device_at_known_places(changes: dict[str, Any]) -> None:
    assert run_ranks(waits, (changes,), 2, timeout_s=120) == [KNOWN, KNOWN]
