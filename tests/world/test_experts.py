"""Mixtures of experts take the same steps wherever their experts are."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.load import find_resume
from megatron_asvr.checkpoint.reader import read_run
from megatron_asvr.config.schema import Config
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.model import sharding
from megatron_asvr.model.asvr import build_model
from megatron_asvr.parallel import groups as process_groups
from megatron_asvr.parallel.collectives import gather_equal
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.plan import make_plan
from tests.run_cases import (
    CODEBOOK_SIZES,
    IDENTITY,
    Bench,
    assert_same_gradients,
    config,
    folder,
    save,
    step_batches,
    tokenizer,
)

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
    "pp2_bare": (2, {"pp": 2, "stages": [2, 0]}),  # no expert on the last stage
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


def layout_run(family: str, degrees: dict[str, Any]) -> dict[str, Any]:
    run = mixture(family, degrees)
    groups = start(run)
    bench = Bench(run, groups)
    grads = bench.gradients()
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


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("mixtral", "tp2_sp"),
        ("mixtral", "ep2_tp2_sp"),
        ("mixtral", "ep2_dp4"),
        ("mixtral", "ep2_pp2_dp2"),
        ("qwen3_moe", "ep2"),
        ("qwen3_moe", "ep2_tp2_sp_dp2"),
        ("qwen3_moe", "ep4_tp2_sp_dp2"),
        ("qwen3_moe", "ep2_pp2_dp2"),
        ("qwen3_moe", "ep2_cp2"),
        ("qwen3_moe", "pp2_bare"),
    ],
)
def test_every_layout_takes_the_same_steps(family: str, layout: str) -> None:
    got, want = results(family, layout), results(family, "single")
    degrees = LAYOUTS[layout][1]
    stages = 1 if layout == "pp2_bare" else degrees.get("pp", 1)
    assert got["held"] * degrees.get("ep", 1) * stages == want["held"]
    assert_same_gradients(got["grads"], want["grads"])
    # Measured at most: losses 7e-8, norms 2e-7 relative.
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-6)
    assert got["norms"] == pytest.approx(want["norms"], rel=1e-6)


def one_sided_run(degrees: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """First gradients when all tokens want the last two experts; choices of the other two."""
    run = mixture("mixtral", degrees, train__recompute="full")
    groups = start(run)
    bench = Bench(run, groups)
    routers = [layer.mlp.router for layer in bench.model.language_model.decoder.layers]
    chosen: list[Tensor] = []
    for router in routers:
        torch.nn.init.zeros_(router.weight)
        router.register_forward_hook(lambda _, __, out: chosen.append(out[1].detach().sum(0)))
    grads = bench.gradients()
    process_groups.destroy()
    return grads, int(torch.stack(chosen)[:, :2].sum())


def test_a_rank_whose_experts_nobody_wants_takes_part() -> None:
    want, _ = run_ranks(one_sided_run, ({},), 1, timeout_s=240)
    got, others = run_ranks(one_sided_run, ({"ep": 2},), 2, timeout_s=240)
    assert others == 0
    assert_same_gradients(got, want)
    experts = "language_model.decoder.layers.0.mlp.experts.local_experts."
    assert got[f"{experts}0.linear_fc1.weight"].norm() == 0
    assert got[f"{experts}3.linear_fc1.weight"].norm() > 0


def saved_run(path: str, degrees: dict[str, Any], changes: dict[str, Any]) -> None:
    run = mixture("qwen3_moe", degrees, **changes)
    groups = start(run)
    bench = Bench(run, groups)
    for step in range(2):
        bench.step(step)
    save(bench, RunFolder(Path(path)), 2)
    process_groups.destroy()


def continued_run(path: str | None, degrees: dict[str, Any], changes: dict[str, Any]) -> Any:
    """Losses and norms of steps 2 and 3, from the start or a checkpoint, and weights before."""
    run = mixture("qwen3_moe", degrees, **changes)
    groups = start(run)
    if path is None:
        bench = Bench(run, groups)
        for step in range(2):
            bench.step(step)
    else:
        run_folder = RunFolder(Path(path))
        other_seed = dataclasses.replace(run, run=dataclasses.replace(run.run, seed=77))
        meta = find_resume(run_folder, IDENTITY).meta
        bench = Bench(other_seed, groups, resume=(run_folder, meta))
    weights = {n: x.clone() for n, x in sharding.full_state(bench.chunks, groups=groups)}
    steps = [bench.step(step) for step in (2, 3)]
    process_groups.destroy()
    return [(x.loss, x.grad_norm) for x in steps], weights


@pytest.mark.parametrize(
    "changes", [{}, {"train__trainable": ["projector", "visual_head"]}], ids=["trained", "frozen"]
)
def test_a_checkpoint_does_not_know_where_the_experts_were(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    wanted, weights = run_ranks(continued_run, (None, {}, changes), 1, timeout_s=240)
    path = str(folder(tmp_path).root)
    run_ranks(saved_run, (path, {"ep": 2}, changes), 2, timeout_s=240)
    _, get = read_run(path)
    stored = {name: get(name) for name in weights}
    for world, degrees in ((1, {}), (4, {"ep": 4, "tp": 2, "sp": True})):
        got, loaded = run_ranks(continued_run, (path, degrees, changes), world, timeout_s=240)
        for mine, theirs in zip(got, wanted, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)
        assert all(torch.equal(loaded[name], stored[name]) for name in weights)


TALL = {"tp": 2, "sp": True, "pp": 2, "vpp": 2, "stages": [1, 1, 1, 1]}
WIDE = {"cp": 2, "ep": 2}  # and dp=2


@pytest.mark.parametrize(("first", "second"), [(TALL, WIDE), (WIDE, TALL)], ids=["to", "fro"])
def test_a_checkpoint_goes_to_a_layout_that_differs_in_every_degree(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    changes = {"model__language__num_layers": 4}
    wanted, weights = run_ranks(continued_run, (None, {}, changes), 1, timeout_s=240)
    path = str(folder(tmp_path).root)
    run_ranks(saved_run, (path, first, changes), 4, timeout_s=240)
    got, loaded = run_ranks(continued_run, (path, second, changes), 4, timeout_s=240)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    _, get = read_run(path)
    assert all(torch.equal(loaded[name], get(name)) for name in weights)


def answered_run(degrees: dict[str, Any]) -> Tensor:
    """Logits in evaluation mode, where tensor parallelism goes without sequence parallelism."""
    run = mixture("qwen3_moe", degrees)
    groups = start(run)
    model = build_model(run, groups=groups, tokenizer=tokenizer(run.model.vision)).eval()
    (batch, *_) = step_batches(run, 0, groups)
    with torch.no_grad():
        logits = model.language_model.logits_full(model.hidden(batch))
    process_groups.destroy()
    return logits


def test_answers_need_no_sequence_parallelism() -> None:
    want = run_ranks(answered_run, ({},), 1, timeout_s=240)
    got = run_ranks(answered_run, ({"tp": 2},), 2, timeout_s=240)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def rounded_run(degrees: dict[str, Any]) -> list[float]:
    run = mixture("mixtral", degrees, train__precision="bf16")
    groups = start(run)
    bench = Bench(run, groups)
    losses = [bench.step(step).loss for step in range(5)]
    process_groups.destroy()
    return losses


def test_bf16_losses_agree() -> None:
    want = run_ranks(rounded_run, ({},), 1, timeout_s=240)
    got = run_ranks(rounded_run, ({"ep": 2, "tp": 2, "sp": True},), 4, timeout_s=240)
    assert got == pytest.approx(want, rel=5e-3)
