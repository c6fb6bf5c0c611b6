"""Products in 8 bits in several layouts: near one process, and with the same delayed scales."""

from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch
import torch.distributed as dist

from megatron_asvr.launch.local import run_ranks
from megatron_asvr.parallel.collectives import gather_objects
from megatron_asvr.parallel.groups import initialize
from megatron_asvr.parallel.plan import make_plan
from tests.fp8_cases import RECIPES, run_of
from tests.run_cases import CODEBOOK_SIZES, Bench
from tests.unit.test_fp8_shadow import assert_same, verdicts

pytestmark = pytest.mark.world

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel__tp": 2},
    "tp2_sp": {"parallel__tp": 2, "parallel__sp": True},
    "pp2": {"parallel__pp": 2},
    "cp2": {"parallel__cp": 2},
    "dp2": {},
}
WITHIN = 5e-3


def layout_run(recipes: tuple[str, ...], degrees: dict[str, Any]) -> dict[str, Any]:
    """Losses of two steps by recipe, and every rank's delayed state after the first."""
    groups, found = None, {}
    for recipe in recipes:
        run = run_of(recipe, **degrees)
        if groups is None:
            plan = make_plan(run, dist.get_world_size(), CODEBOOK_SIZES)
            groups = initialize(plan)
        bench = Bench(run, groups)
        losses = [bench.step(0).loss]
        if recipe == "delayed":
            mine = {key: x.clone() for key, x, _ in bench.model.watched.state()}
            found["state"] = gather_objects(mine, group=groups.world)
        found[recipe] = [*losses, bench.step(1).loss]
    return found


MIXTURE = {
    "model__language__family": "mixtral",
    "model__language__num_experts": 2,
    "model__language__num_layers": 1,
}


def test_an_expert_has_the_scales_of_the_ranks_that_hold_it() -> None:
    one = run_ranks(layout_run, (("delayed",), MIXTURE), 1)
    got = run_ranks(layout_run, (("delayed",), {**MIXTURE, "parallel__ep": 2}), 2)
    assert got["delayed"] == pytest.approx(one["delayed"], rel=WITHIN)
    (wanted,), states = one["state"], got["state"]
    experts = [{key for key in state if ".local_experts." in key} for state in states]
    assert experts[0]
    assert not experts[0] & experts[1]
    for state in states:
        for key, x in state.items():
            assert torch.equal(x[..., 1], wanted[key][..., 1]), key


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return run_ranks(layout_run, (RECIPES, {}), 1)


@pytest.fixture(scope="module")
def split() -> dict[str, Any]:
    return run_ranks(layout_run, (RECIPES, LAYOUTS["tp2"]), 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_near_those_of_one_process_and_scales_are_shared(
    layout: str, single: dict[str, Any], split: dict[str, Any]
) -> None:
    got = split if layout == "tp2" else run_ranks(layout_run, (RECIPES, LAYOUTS[layout]), 2)
    for recipe in RECIPES:
        assert got[recipe] == pytest.approx(single[recipe], rel=WITHIN), recipe
        if layout == "tp2_sp":  # what is gathered has the largest value of the whole
            assert got[recipe] == pytest.approx(split[recipe], rel=1e-5), recipe
    wanted, states = single["state"][0], got["state"]
    known = {key for state in states for key in state}
    assert known == set(wanted)
    for state in states:
        for key, x in state.items():
            # The second role is the weight, whose largest value is that of all shards, exactly.
            assert torch.equal(x[..., 1], wanted[key][..., 1]), key
            if layout == "dp2":  # and micro-batches are the same, whoever has them
                assert torch.equal(x, wanted[key]), key
    if layout != "pp2":
        assert all(torch.equal(x, states[1][key]) for key, x in states[0].items())


def guarded(degrees: dict[str, Any]) -> list[Any]:
    run = run_of("block", **degrees)
    groups = initialize(make_plan(run, dist.get_world_size(), CODEBOOK_SIZES))
    return verdicts(run, groups)


def test_the_guard_from_outside_computes_split_linears_again_in_the_same_order() -> None:
    """Their collectives are called once more in the backward pass, on all ranks."""
    inside, outside = run_ranks(guarded, ({**LAYOUTS["tp2_sp"], "train__recompute": "full"},), 2)
    # Inside, cosines are those of each rank's part of a sum, and shares those of whole operands.
    assert_same(inside, outside, within=2e-3, shares=False)
