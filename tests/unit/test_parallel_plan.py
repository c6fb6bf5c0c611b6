"""Plans: what is left becomes data parallel, and what cannot be is refused."""

import pytest

from megatron_asvr.config.schema import ParallelConfig
from megatron_asvr.errors import ConfigError
from megatron_asvr.parallel.plan import ParallelPlan, make_plan


def test_what_the_model_does_not_take_is_data_parallel():
    plan = make_plan(ParallelConfig(tp=2, pp=2, sp=True), 8)
    assert plan == ParallelPlan(tp=2, pp=2, dp=2, sp=True, world=8)
    assert plan.model_ranks == 4


def test_one_rank():
    assert make_plan(ParallelConfig(), 1) == ParallelPlan()


def test_described_in_one_line():
    plan = make_plan(ParallelConfig(tp=2, pp=2, vpp=2, sp=True), 8)
    assert plan.describe() == "TP2 x PP2 x CP1 x DP2 x VPP2 x SP = 8 ranks"


@pytest.mark.parametrize(
    ("config", "world", "message"),
    [
        ({"tp": 0}, 1, "parallel.tp=0 must be at least 1"),
        ({"cp": -1}, 1, "parallel.cp=-1"),
        ({}, 0, "world of 0"),
        ({"tp": 2, "pp": 2}, 6, "multiple of 4.*got 6.*4, 8, 16"),
        ({"tp": 4}, 2, "got 2"),
        ({"vpp": 2}, 2, "parallel.vpp=2 needs parallel.pp >= 2"),
        ({"pp": 2, "vpp": 1}, 2, "at least 2 chunks"),
        ({"sp": True}, 2, "parallel.sp=true needs parallel.tp >= 2"),
    ],
)
def test_impossible_plans(config, world, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(ParallelConfig(**config), world)
