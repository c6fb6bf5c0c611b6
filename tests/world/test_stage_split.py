"""Layers spread unevenly over stages and chunks compute what one rank computes."""

import dataclasses

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron)

import pytest
import torch
import torch.distributed as dist

from megatron_asvr.launch.local import run_ranks
from megatron_asvr.parallel import groups as process_groups
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.plan import ParallelPlan
from tests.language_cases import SMALL, build, one_rank
from tests.world.test_language_layouts import ALL, loss_and_gradients

pytestmark = pytest.mark.world

ALL["four_tied"] = dataclasses.replace(SMALL, num_layers=4, tied_embeddings=True)
SPLITS = {
    "first_stage_short": ParallelPlan(pp=2, stages=(1, 3), world=2),
    "first_stage_empty": ParallelPlan(pp=2, stages=(0, 4), world=2),
    "last_stage_empty": ParallelPlan(pp=2, stages=(4, 0), world=2),
    "middle_stage_empty": ParallelPlan(pp=4, stages=(2, 0, 1, 1), world=4),
    "chunks": ParallelPlan(pp=2, vpp=2, stages=(1, 2, 1, 0), world=2),
    "first_chunk_empty": ParallelPlan(pp=2, vpp=2, stages=(0, 2, 1, 1), world=2),
    "second_chunk_empty": ParallelPlan(pp=2, vpp=2, stages=(2, 0, 1, 1), world=2),
}


def checkpoint_keys(case: str, groups: Groups) -> set[str]:
    """Keys of megatron-core's checkpoint, from all stages and chunks together."""
    chunks = [build(ALL[case], groups, vp_stage=i) for i in range(groups.plan.vpp or 1)]
    mine = {x.key for chunk in chunks for x in chunk.sharded_state_dict().values()}
    everyone: list[set[str]] = [set() for _ in range(groups.plan.world)]
    dist.all_gather_object(everyone, mine)
    return set().union(*everyone)


def split_run(split: str, case: str):
    groups = process_groups.initialize(SPLITS[split], 60.0)
    found = (*loss_and_gradients(case, groups), checkpoint_keys(case, groups))
    process_groups.destroy()
    return found


@pytest.fixture(scope="module")
def expected():
    with one_rank() as groups:
        return {
            case: (*loss_and_gradients(case, groups), checkpoint_keys(case, groups))
            for case in ("virtual", "four_tied")
        }


@pytest.mark.parametrize("split", SPLITS)
def test_splits_agree_with_one_rank(split, expected):
    case = "four_tied" if split in ("first_stage_empty", "chunks") else "virtual"
    loss, gradients, keys = expected[case]
    got_loss, got, got_keys = run_ranks(
        split_run, (split, case), SPLITS[split].world, timeout_s=120.0
    )
    assert got_keys == keys
    assert got.keys() == gradients.keys()
    assert abs(got_loss - loss) <= 1e-6 * loss  # measured 0
    everything = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, gradient in gradients.items():
        limit = 1e-5 * max(gradient.norm(), 1e-3 * everything)
        error = (got[name] - gradient).norm()
        assert error <= limit, f"{split} {name}: {error} over {limit}"
