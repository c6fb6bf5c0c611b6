"""Mixtures of experts take the same steps wherever their experts are."""

import functools
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_asvr.config.schema import Config
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.model import sharding
from megatron_asvr.parallel import groups as process_groups
from megatron_asvr.parallel.collectives import gather_equal
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.plan import make_plan
from megatron_asvr.precision.routing import balanced
from megatron_asvr.train.step import (
    agree,
    backward,
    loss_function,
    reduce_gradients,
    run_schedule,
)
from tests.run_cases import CODEBOOK_SIZES, Bench, config, step_batches

pytestmark = pytest.mark.world

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "ep2": (2, {"ep": 2}),  # the two data-parallel ranks
    "ep2_dp4": (4, {"ep": 2}),
    "ep2_tp2_sp": (2, {"ep": 2, "tp": 2, "sp": True}),  # the two tensor-parallel ranks
    "ep2_tp2_sp_dp2": (4, {"ep": 2, "tp": 2, "sp": True}),
    "ep4_tp2_sp_dp2": (4, {"ep": 4, "tp": 2, "sp": True}),
    "tp2_sp": (2, {"tp": 2, "sp": True}),
    "ep2_pp2_dp2": (4, {"ep": 2, "pp": 2}),
    "ep2_cp2": (2, {"ep": 2, "cp": 2}),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"family": "mixtral", "num_experts": 4},
    "qwen3_moe": {
        "family": "qwen3_moe",
        "num_experts": 8,
        "experts_per_token": 3,
        "expert_ffn_hidden_size": 20,
        "router_aux_loss_coef": 0.1,
        "tied_embeddings": True,
    },
}


def mixture(family: str, degrees: dict[str, Any], **changes: Any) -> Config:
    language = {f"model__language__{name}": x for name, x in FAMILIES[family].items()}
    parts = ["vision_encoder", "projector", "language_model", "visual_head"]
    changes = {"train__trainable": parts, "train__global_batch": 8, **language, **changes}
    return config(parallel=degrees, **changes)


def start(run: Config) -> Groups:
    return process_groups.initialize(make_plan(run, dist.get_world_size(), CODEBOOK_SIZES))


def first_gradients(bench: Bench) -> dict[str, Tensor]:
    """Full gradients of the first step, the load-balancing loss included."""
    groups, batches = bench.groups, step_batches(bench.run, 0, bench.groups)
    agreement = agree(batches, stop=False, groups=groups)
    loss = loss_function(bench.run.loss, agreement, num_micro_batches=len(batches))
    for chunk in bench.wrapped:
        chunk.zero_grad_buffer()
    passes = functools.partial(run_schedule, bench.wrapped, batches, loss, forward_only=True)
    with balanced(bench.wrapped, passes, group=groups.tp_cp_dp):
        backward(bench.wrapped, batches, loss)
    reduce_gradients(bench.wrapped, groups=groups, whole=True)
    with torch.no_grad():
        for _, param in sharding.named(bench.chunks):
            param.copy_(param.main_grad if param.requires_grad else torch.zeros_like(param))
    return dict(sharding.full_state(bench.chunks, groups=groups))


def layout_run(family: str, degrees: dict[str, Any]) -> dict[str, Any]:
    run = mixture(family, degrees)
    groups = start(run)
    grads = first_gradients(Bench(run, groups))
    bench = Bench(run, groups)
    steps = [bench.step(step) for step in range(5)]
    for name, param in sharding.named(bench.chunks):
        if sharding.is_expert(param):
            copies = gather_equal(param, group=groups.expert_dp)
            assert all(torch.equal(copy, copies[0]) for copy in copies), name
    held = sum(sharding.is_expert(param) for _, param in sharding.named(bench.chunks))
    process_groups.destroy()
    return {
        "losses": [result.loss for result in steps],
        "norms": [result.grad_norm for result in steps],
        "grads": grads,
        "held": held,
    }


@functools.cache
def results(family: str, layout: str) -> dict[str, Any]:
    world, degrees = LAYOUTS[layout]
    return run_ranks(layout_run, (family, degrees), world, timeout_s=240)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_every_layout_takes_the_same_steps(family: str, layout: str) -> None:
    got, want = results(family, layout), results(family, "single")
    degrees = LAYOUTS[layout][1]
    assert got["held"] * degrees.get("ep", 1) * degrees.get("pp", 1) == want["held"]
    assert list(got["grads"]) == list(want["grads"])
    everything = torch.stack([g.norm() for g in want["grads"].values()]).norm()
    for name, grad in want["grads"].items():
        bound = 1e-5 * max(float(grad.norm()), 1e-3 * float(everything))
        assert float((got["grads"][name] - grad).norm()) <= bound, name
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-6)
    assert got["norms"] == pytest.approx(want["norms"], rel=1e-6)
