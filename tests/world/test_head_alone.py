"""The visual head alone in the last stage, the text loss in the stage before: the same steps."""

from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron)

import pytest
import torch

from megatron_asvr.errors import AsvrError
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.train.passes import run_schedule
from megatron_asvr.train.step import agree, loss_function, sum_parts
from megatron_asvr.train.telemetry import CodeUsage
from tests.run_cases import CODEBOOK_SIZES, Bench, step_batches
from tests.run_data import make_files
from tests.world.test_certify import ask
from tests.world.test_train_layouts import (
    LAYOUTS,
    TIED,
    layout_config,
    load_run,
    results,
    same_steps,
    save_run,
    start,
)

pytestmark = pytest.mark.world

ALONE: dict[str, tuple[int, dict[str, Any]]] = {
    "pp2": (2, {"pp": 2}),
    "pp3": (3, {"pp": 3, "stages": (1, 3, 0)}),
    "pp4_no_layer_beside_the_lm_head": (4, {"pp": 4, "stages": (2, 2, 0, 0)}),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2, "stages": (1, 2, 1, 0)}),
    "pp4_vpp2": (4, {"pp": 4, "vpp": 2, "stages": (1, 1, 1, 1, 0, 0, 0, 0)}),
    "tp2_sp_pp2": (4, {"tp": 2, "sp": True, "pp": 2}),
    "cp2_pp2": (4, {"cp": 2, "pp": 2}),
}
ALONE = {
    f"alone_{name}": (world, {**degrees, "head_alone": True})
    for name, (world, degrees) in ALONE.items()
}
LAYOUTS |= ALONE


@pytest.mark.parametrize("layout", ALONE)
def test_every_layout_takes_the_same_steps(layout: str) -> None:
    same_steps(layout)


@pytest.mark.parametrize(
    "trained", [("projector", "visual_head"), ("visual_head",), ("projector",), ("language_model",)]
)
def test_frozen_parts_on_either_side_take_the_same_steps(trained: tuple[str, ...]) -> None:
    same_steps("alone_pp2_vpp2", (("train__trainable", trained),))


@pytest.mark.parametrize("layout", ["alone_pp2", "alone_pp3", "alone_pp4_vpp2"])
def test_tied_embeddings_take_the_same_steps(layout: str) -> None:
    same_steps(layout, TIED)


MIXTURE = (
    ("model__language__family", "mixtral"),
    ("model__language__num_experts", 4),
    ("model__language__router_aux_loss_coef", 0.1),
)


def test_a_stage_without_a_router_takes_part_in_balancing() -> None:
    same_steps("alone_pp2", MIXTURE)


def test_recomputation_takes_the_same_steps() -> None:
    changes = (("train__recompute", "full"), ("train__recompute_visual_head", True))
    same_steps("alone_tp2_sp_pp2", changes)


@pytest.mark.parametrize(
    ("first", "second"), [("alone_tp2_sp_pp2", "tp2"), ("tp2", "alone_pp2_vpp2")]
)
def test_a_checkpoint_does_not_know_where_the_heads_were(
    first: str, second: str, tmp_path: Path
) -> None:
    (world, degrees), (new_world, new_degrees) = LAYOUTS[first], LAYOUTS[second]
    run_ranks(save_run, (degrees, {}, str(tmp_path)), world, timeout_s=240)
    got = run_ranks(load_run, (new_degrees, {}, str(tmp_path)), new_world, timeout_s=240)
    want = results("single")
    assert [r.loss for r in got] == pytest.approx(want["losses"][2:], rel=1e-6)
    assert [r.grad_norm for r in got] == pytest.approx(want["norms"][2:], rel=1e-5)


def numbers_run(degrees: dict[str, Any]) -> dict[str, Any]:
    """Everything that is counted beside a step, and what a broken LM head is blamed on."""
    run = layout_config(degrees)
    groups = start(run)
    bench = Bench(run, groups)
    batches = step_batches(run, 0, groups)
    agreement = agree(batches, stop=False, groups=groups)
    loss = loss_function(run.loss, agreement, num_micro_batches=len(batches))
    with torch.no_grad():
        parts = run_schedule(bench.chunks, batches, loss, forward_only=True)
    usage = CodeUsage(CODEBOOK_SIZES)
    usage.add(parts)
    found = {
        "agreement": agreement,
        "totals": sum_parts(parts, depth=len(CODEBOOK_SIZES), groups=groups)[0].tolist(),
        "usage": usage.values(groups=groups),
    }
    for chunk in bench.chunks:
        if chunk.post_process:
            torch.nn.init.constant_(chunk.language_model.output_layer.weight, float("nan"))
    with pytest.raises(AsvrError) as error:
        bench.step(0)
    return {**found, "blame": str(error.value)}


def test_what_is_counted_does_not_know_where_the_heads_are() -> None:
    got = run_ranks(numbers_run, (ALONE["alone_pp3"][1],), 3, timeout_s=240)
    want = run_ranks(numbers_run, ({},), 1, timeout_s=240)
    assert got["agreement"] == want["agreement"]
    assert got["usage"] == want["usage"]
    assert got["totals"] == pytest.approx(want["totals"], rel=1e-6)
    assert "rank 1: loss nan from samples sample 0" in got["blame"]
    assert "rank 2" not in got["blame"]


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("tp=2,sp=true,pp=2", {"collectives": True}),
        ("cp=2,pp=2", {"data__packing": True, "data__codes": "cache", "prepare": True}),
    ],
)
def test_real_samples_are_certified(layout: str, changes: dict[str, Any], tmp_path: Path) -> None:
    files = make_files(tmp_path / "files")
    certificate = ask(files, f"{layout},head_alone=true", **changes)
    assert certificate.verdict.ok, certificate.verdict
