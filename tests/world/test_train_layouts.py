"""The same steps in every layout: losses, gradients and gradient norms of one rank."""

import functools
import math
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch
import torch.distributed as dist

from megatron_asvr.batch import MicroBatch
from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.meta import read_meta
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import AsvrError
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.model import sharding
from megatron_asvr.parallel.collectives import gather_equal, gather_objects
from megatron_asvr.parallel.groups import Groups, initialize
from megatron_asvr.parallel.plan import make_plan
from megatron_asvr.train.passes import backward
from megatron_asvr.train.step import StepResult, agree, loss_function, reduce_gradients, train_step
from megatron_asvr.train.telemetry import CodeUsage, gradient_cosine
from megatron_asvr.train.work import Work
from tests.run_cases import (
    CODEBOOK_SIZES,
    Bench,
    assert_same_gradients,
    config,
    folder,
    micro_batch,
    save,
    step_batches,
    view_of,
)

pytestmark = pytest.mark.world

ALL = ["vision_encoder", "projector", "language_model", "visual_head"]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2_sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2}),
    "cp2": (2, {"cp": 2}),
    "dp2": (2, {}),
    "tp2_dp2": (4, {"tp": 2}),
    "tp2_pp2": (4, {"tp": 2, "pp": 2}),
    "pp2_dp2": (4, {"pp": 2}),
    "tp2_sp_cp2": (4, {"tp": 2, "sp": True, "cp": 2}),
}


def layout_config(degrees: dict[str, Any], **changes: Any) -> Config:
    degrees = {"stages": (1,) * 4 if "vpp" in degrees else None, **degrees}
    return config(
        model__language__num_layers=4,
        train__global_batch=8,
        parallel=degrees,
        **{"train__trainable": ALL, **changes},
    )


def start(run: Config) -> Groups:
    return initialize(make_plan(run, dist.get_world_size(), CODEBOOK_SIZES))


def layout_run(degrees: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Losses and norms of five steps, and the first step's gradients as full tensors."""
    run = layout_config(degrees, **changes)
    groups = start(run)
    bench = Bench(run, groups)
    grads = bench.gradients()
    batches = step_batches(run, 0, groups)
    work = Work(run, None, groups=groups).counts(batches)
    agreement = agree(batches, stop=False, groups=groups, work=work)
    cosine = None
    if not run.train.optim.overlap_grad_reduce:
        cosine = gradient_cosine(bench.wrapped, batches, agreement, groups=groups)
    steps, usage = [bench.step(step) for step in range(5)], CodeUsage(CODEBOOK_SIZES)
    for result in steps:
        usage.add(result.parts)
    check_replicas(bench, groups)
    if run.train.optim.overlap_grad_reduce:
        require_early_sums(bench, batches, groups)
    return {
        "codes": usage.values(groups=groups),
        "work": agreement.work,
        "losses": [result.loss for result in steps],
        "totals": [result.totals for result in steps],
        "norms": [result.grad_norm for result in steps],
        "grads": grads,
        "cosine": cosine,
    }


def require_early_sums(bench: Bench, batches: list[MicroBatch], groups: Groups) -> None:
    """All sums have begun when the backward pass ends."""
    for chunk in bench.wrapped:
        chunk.zero_grad_buffer()
    backward(bench.wrapped, batches, bench.loss(batches))
    for chunk in bench.wrapped:
        assert all(group.grad_reduce_handle is not None for group in chunk.bucket_groups)
    reduce_gradients(bench.wrapped, groups=groups)


def check_replicas(bench: Bench, groups: Groups) -> None:
    """Weights that several ranks hold have stayed the same bits on all of them."""
    for name, param in sharding.named(bench.chunks):
        ways = [groups.dp_cp] if sharding.is_split(param) else [groups.dp_cp, groups.tp]
        if not sharding.is_expert(param):
            for group in ways:
                copies = gather_equal(param, group=group)
                assert all(torch.equal(copy, copies[0]) for copy in copies), name


@functools.cache
def results(layout: str, changes: tuple[tuple[str, Any], ...] = ()) -> dict[str, Any]:
    world, degrees = LAYOUTS[layout]
    return run_ranks(layout_run, (degrees, dict(changes)), world, timeout_s=240)


def same_steps(layout: str, changes: tuple[tuple[str, Any], ...] = ()) -> None:
    got, want = results(layout, changes), results("single", changes)
    # Measured over all layouts: losses 1.3e-7, norms 2.7e-7 relative, gradients 1.2e-6.
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-6)
    assert got["norms"] == pytest.approx(want["norms"], rel=1e-6)
    for mine, theirs in zip(got["totals"], want["totals"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert_same_gradients(got["grads"], want["grads"])
    assert got["codes"] == want["codes"]
    assert got["work"] == want["work"]
    if want["cosine"] is None:
        assert got["cosine"] is None
    else:
        assert -1 < want["cosine"] < 1
        assert got["cosine"] == pytest.approx(want["cosine"], abs=1e-5)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_every_layout_takes_the_same_steps(layout: str) -> None:
    same_steps(layout)


OVERLAP = (("train__optim__overlap_grad_reduce", True),)


@pytest.mark.parametrize("layout", ["dp2", "pp2_dp2", "pp2_vpp2"])
def test_gradients_summed_during_the_backward_pass_take_the_same_steps(layout: str) -> None:
    same_steps(layout, OVERLAP)


TIED = (("model__language__tied_embeddings", True), ("model__language__family", "qwen3"))


@pytest.mark.parametrize("layout", ["pp2_vpp2", "tp2_pp2", "pp2_dp2", "tp2_sp_cp2"])
def test_tied_embeddings_and_norms_per_head_take_the_same_steps(layout: str) -> None:
    same_steps(layout, TIED)


@pytest.mark.parametrize("part", ["visual_head", "projector"])
def test_a_stage_with_nothing_to_train_takes_the_same_steps(part: str) -> None:
    same_steps("pp2_vpp2", (("train__trainable", (part,)),))


def bad_run(degrees: dict[str, Any]) -> list[str]:
    """What every rank says about images of one micro-batch that are no numbers."""
    run = layout_config(degrees)
    groups = start(run)
    bench = Bench(run, groups)
    batches = step_batches(run, 7, groups)
    if groups.dp_rank == 0 and batches[0].pixel_values_ICHW is not None:
        batches[0].pixel_values_ICHW[:] = math.nan
    agreement = agree(batches, stop=False, groups=groups)
    loss = loss_function(run.loss, agreement, num_micro_batches=len(batches))
    with pytest.raises(AsvrError) as err:
        train_step(bench.wrapped, bench.optimizer, batches, loss, step=7, groups=groups)
    return gather_objects(str(err.value), group=groups.world)


@pytest.mark.parametrize("layout", ["pp2_dp2", "tp2_sp_cp2"])
def test_every_rank_names_the_samples_of_a_loss_that_is_not_finite(layout: str) -> None:
    world, degrees = LAYOUTS[layout]
    said = run_ranks(bad_run, (degrees,), world, timeout_s=240)
    assert len(set(said)) == 1
    assert "from samples sample 700.0, sample 700.1" in said[0]
    assert "sample 701" not in said[0]
    assert "sample 702" not in said[0]


def nothing_run(degrees: dict[str, Any]) -> tuple[float, float, bool]:
    """A step whose global batch has no image and no target, after two others."""
    run = layout_config(degrees, train__optim__weight_decay=0.0)
    groups = start(run)
    bench = Bench(run, groups)
    bench.step(0)
    batches = [view_of(micro_batch(run, 1, images=(-1, -1)), groups) for _ in range(4)]
    agreement = agree(batches, stop=False, groups=groups)
    loss = loss_function(run.loss, agreement, num_micro_batches=len(batches))
    result = train_step(bench.wrapped, bench.optimizer, batches, loss, step=1, groups=groups)
    finite = all(bool(x.isfinite().all()) for x in bench.weights().values())
    return result.loss, result.grad_norm, finite


@pytest.mark.parametrize("layout", ["single", "tp2_sp_cp2", "pp2_vpp2", "dp2"])
def test_a_global_batch_without_any_target_has_no_loss_and_no_gradient(layout: str) -> None:
    world, degrees = LAYOUTS[layout]
    assert run_ranks(nothing_run, (degrees,), world, timeout_s=240) == (0.0, 0.0, True)


def save_run(degrees: dict[str, Any], changes: dict[str, Any], path: str) -> None:
    run = layout_config(degrees, **changes)
    bench = Bench(run, start(run))
    for step in range(2):
        bench.step(step)
    save(bench, folder(path) if bench.groups.rank == 0 else RunFolder(Path(path)), 2)


def load_run(degrees: dict[str, Any], changes: dict[str, Any], path: str) -> list[StepResult]:
    run = layout_config(degrees, **changes)
    made = RunFolder(Path(path))
    bench = Bench(run, start(run), resume=(made, read_meta(made.step(2))))
    return [bench.step(step) for step in range(2, 5)]


@pytest.mark.parametrize(
    ("first", "second", "changes"),
    [
        ("pp2_vpp2", "tp2_sp_cp2", TIED),
        ("tp2_pp2", "pp2_vpp2", TIED),
        ("tp2_pp2", "single", (("train__optim__distributed", False),)),
        ("pp2_vpp2", "cp2", (("train__trainable", ("visual_head",)),)),
        ("dp2", "pp2", (("train__precision", "bf16"),)),
    ],
)
def test_a_checkpoint_goes_from_layout_to_layout(
    first: str, second: str, changes: tuple[tuple[str, Any], ...], tmp_path: Path
) -> None:
    (world, degrees), (new_world, new_degrees) = LAYOUTS[first], LAYOUTS[second]
    run_ranks(save_run, (degrees, dict(changes), str(tmp_path)), world, timeout_s=240)
    got = run_ranks(load_run, (new_degrees, dict(changes), str(tmp_path)), new_world, timeout_s=240)
    want = results("single", changes)
    rel = 5e-3 if "bf16" in dict(changes).values() else 1e-6
    assert [r.loss for r in got] == pytest.approx(want["losses"][2:], rel=rel)
    assert [r.grad_norm for r in got] == pytest.approx(want["norms"][2:], rel=10 * rel)
