"""Plans: what the model does not take becomes data parallel, and every chunk has its layers."""

import pytest

from megatron_asvr.config.schema import Config, LanguageConfig, ModelConfig, ParallelConfig
from megatron_asvr.errors import ConfigError
from megatron_asvr.parallel.plan import ParallelPlan, make_plan


def run(num_layers=4, **degrees):
    model = ModelConfig(language=LanguageConfig(num_layers=num_layers))
    return Config(model=model, parallel=ParallelConfig(**degrees))


def test_what_the_model_does_not_take_is_data_parallel():
    plan = make_plan(run(tp=2, pp=2, sp=True, stages=(1, 3)), 8)
    assert plan == ParallelPlan(tp=2, pp=2, stages=(1, 3), dp=2, sp=True, world=8)


def test_one_rank_holds_all_layers():
    assert make_plan(run(), 1) == ParallelPlan(stages=(4,))


def test_layers_follow_the_cost_of_the_visual_head():
    without = make_plan(run(num_layers=32, pp=2), 2)
    beside = make_plan(run(num_layers=32, pp=2), 2, codebook_sizes=(16384,) * 8)
    assert sum(without.stages) == sum(beside.stages) == 32
    assert beside.stages[1] < without.stages[1]


def test_experts_are_shared_among_the_ranks_of_a_stage():
    assert make_plan(run(ep=4), 4) == ParallelPlan(stages=(4,), dp=4, ep=4, world=4)


def test_described_in_one_line():
    plan = make_plan(run(tp=2, pp=2, vpp=2, sp=True), 8)
    assert plan.describe() == "TP2 x PP2 x CP1 x DP2 x VPP2 x SP = 8 ranks"


def test_a_world_that_the_model_does_not_divide():
    with pytest.raises(ConfigError, match=r"multiple of 4 ranks, got 6; use 4, 8, 12, \.\.\."):
        make_plan(run(tp=2, pp=2), 6)
