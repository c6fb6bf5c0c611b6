"""A linear that 8 bits do not suit is found, said, and computed in full from then on."""

import math

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch

from megatron_asvr.config.precision import check_precision
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import ConfigError
from megatron_asvr.train.drift import Verdict, judge
from tests.fp8_cases import run_of
from tests.language_cases import one_rank
from tests.run_cases import Bench, step_batches

BAD = "language_model.decoder.layers.1.mlp.linear_fc1"


def plant(bench: Bench) -> None:
    """Let the weight of ``BAD`` underflow in E4M3: one huge column, which meets only zeros."""
    layer = bench.model.language_model.decoder.layers[1]
    with torch.no_grad():
        layer.pre_mlp_layernorm.weight[3] = 0.0
        layer.mlp.linear_fc1.weight.mul_(4.0)  # so that the loss shows whether it is there
        layer.mlp.linear_fc2.weight.mul_(4.0)
        layer.mlp.linear_fc1.weight[:, 3] = 3e6


def look(bench: Bench, run: Config, step: int) -> Verdict:
    batches = step_batches(run, step, bench.groups)
    loss = bench.loss(batches)
    return judge(bench.wrapped, batches, loss, run.precision.fp8, groups=bench.groups)


def frozen(recipe: str) -> Config:
    """Nothing of the language model trains, so that what is planted stays; the rest slowly."""
    return run_of(recipe, train__trainable=["projector", "visual_head"], train__optim__lr=1e-4)


@pytest.mark.parametrize("recipe", ["current", "delayed"])
def test_a_planted_bad_linear_leaves_8_bits_alone_and_training_recovers(recipe: str) -> None:
    run, exact = frozen(recipe), frozen("none")
    with one_rank() as groups:
        bench, full, sick = Bench(run, groups), Bench(exact, groups), Bench(run, groups)
        for one in (bench, full, sick):
            plant(one)
            one.step(0)
        verdict = look(bench, run, 0)
        assert verdict.moved == (BAD,)
        values = verdict.values
        assert values["moved"] == BAD
        assert values[f"{BAD}.weight_underflow"] > 0.99
        assert values["least_cosine"] == values[f"{BAD}.cosine"] < 0.1
        others = [v for k, v in values.items() if k.endswith(".cosine") and BAD not in k]
        assert len(others) == len(bench.model.watched.products) - 1
        assert min(others) > 0.99
        assert values["loss_fp8"] != values["loss_exact"]
        errors = {"guarded": 0.0, "sick": 0.0}
        for step in range(1, 5):
            wanted = full.step(step).loss
            for name, one in (("guarded", bench), ("sick", sick)):
                errors[name] = max(errors[name], abs(one.step(step).loss / wanted - 1))
        assert look(bench, run, 4).moved == ()
        assert errors["guarded"] < 5e-3  # measured 2e-3
        assert errors["sick"] > 1.5e-2  # measured 2.1e-2


def test_looking_changes_no_bit_and_the_same_linears_stay_out_when_told_again() -> None:
    run = run_of("delayed")
    with one_rank() as groups:
        watched, other = Bench(run, groups), Bench(run, groups)
        for step in range(2):
            assert watched.step(step).loss == other.step(step).loss
            assert look(watched, run, step).moved == ()
        weights, scales = other.weights(), {k: x for k, x, _ in other.model.watched.state()}
        assert all(torch.equal(x, weights[name]) for name, x in watched.weights().items())
        for key, x, _ in watched.model.watched.state():
            assert torch.equal(x, scales[key]), key
        watched.model.watched.turn_off([BAD, "of another stage"])
        off = [n for n, p in watched.model.watched.products.items() if not p.is_on]
        assert off == [BAD]
        values = look(watched, run, 1).values
        assert f"{BAD}.cosine" not in values
        assert math.isfinite(values["loss_fp8"])


def test_the_guard_is_refused_where_it_has_nothing_to_compare_or_would_change_it() -> None:
    guarded = {"precision__fp8__guard_every_steps": 5}
    for recipe, emulate in (("delayed", True), ("current", False), ("block", False)):
        check_precision(run_of(recipe, **guarded, precision__fp8__emulate=emulate))
    with pytest.raises(ConfigError, match="guard_every_steps=5 with recipe=delayed"):
        check_precision(run_of("delayed", **guarded, precision__fp8__emulate=False))
    with pytest.raises(ConfigError, match="guard_every_steps=5 with recipe=none: nothing"):
        check_precision(run_of("none", **guarded))
