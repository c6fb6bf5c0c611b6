"""Every layout computes the losses and gradients of one rank, and checkpoints fit them all."""

from collections.abc import Iterator
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron)

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_asvr.launch.local import run_ranks
from megatron_asvr.model import sharding
from megatron_asvr.model.asvr import AsvrModel
from megatron_asvr.model.loss import LossSums, joint_loss
from megatron_asvr.parallel import groups as process_groups
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.plan import ParallelPlan
from tests.asvr_cases import CONFIG, LENGTH, build, gradients, micro_batch
from tests.language_cases import one_rank

pytestmark = pytest.mark.world

KINDS = ["images", "no_images", "no_text", "one_image"]
PLANS = {
    "tp2": ParallelPlan(tp=2, world=2),
    "tp2_sp": ParallelPlan(tp=2, sp=True, world=2),
    "pp2": ParallelPlan(pp=2, world=2),
    "pp2_no_layer_first": ParallelPlan(pp=2, stages=(0, 2), world=2),
    "tp2_pp2_sp": ParallelPlan(tp=2, pp=2, sp=True, world=4),
    "tp2_pp2_sp_no_layer_last": ParallelPlan(tp=2, pp=2, stages=(2, 0), sp=True, world=4),
}


def stage(groups: Groups) -> AsvrModel:
    return build(CONFIG, groups)


def losses_and_gradients(groups: Groups) -> tuple[list[float], dict[str, Tensor]]:
    """Loss of each kind of batch, and the full gradients of their sum."""
    model = stage(groups)

    def finish(sums: LossSums) -> tuple[Tensor, Tensor, Tensor]:
        loss = joint_loss(sums, global_text_count=20, global_visual_count=10, visual_weight=0.5)
        return loss, torch.zeros((), dtype=torch.int), loss.detach()

    def forward(batches: Iterator, model: AsvrModel) -> tuple[Any, Any]:
        return model(next(batches)), finish

    losses = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter([micro_batch(kind, groups) for kind in KINDS]),
        model=model,
        num_microbatches=len(KINDS),
        seq_length=LENGTH,
        micro_batch_size=2,
        forward_only=False,
    )
    found = [None]
    if groups.is_last_stage:
        found = [[loss.item() for loss in losses]]
    if groups.plan.pp > 1:
        dist.broadcast_object_list(
            found, src=dist.get_global_rank(groups.pp, groups.plan.pp - 1), group=groups.pp
        )
    return found[0], full_gradients(model, groups)


def full_gradients(model: AsvrModel, groups: Groups) -> dict[str, Tensor]:
    """Full gradients by canonical name, after the sums that a training step makes."""
    trained = gradients(model)
    partial = {id(parameter) for parameter in model.partial_grad_parameters()}
    for local, parameter in model.named_parameters():
        gradient = trained.get(local)
        if gradient is None:
            parameter.data = torch.zeros_like(parameter)
            continue
        sequence = groups.plan.sp and getattr(parameter, "sequence_parallel", False)
        if sequence or id(parameter) in partial:
            dist.all_reduce(gradient, group=groups.tp)
        parameter.data = gradient
    return dict(sharding.full_state(model, groups=groups))


def on_ranks(layout: str) -> tuple[list[float], dict[str, Tensor]]:
    groups = process_groups.initialize(PLANS[layout], 60.0)
    found = losses_and_gradients(groups)
    process_groups.destroy()
    return found


@pytest.fixture(scope="module")
def expected():
    with one_rank() as groups:
        return losses_and_gradients(groups)


@pytest.mark.parametrize("layout", list(PLANS))
def test_layouts_agree_with_one_rank(layout, expected):
    losses, wanted = expected
    got_losses, got = run_ranks(on_ranks, (layout,), PLANS[layout].world, timeout_s=120.0)
    assert got_losses == pytest.approx(losses, rel=1e-6)
    assert got.keys() == wanted.keys()
    everything = torch.stack([g.norm() for g in wanted.values()]).norm()
    for name, gradient in wanted.items():
        limit = 1e-5 * max(gradient.norm(), 1e-3 * everything)
        error = (got[name] - gradient).norm()
        assert error <= limit, f"{layout} {name}: {error} over {limit}"


def save(layout: str, folder: str) -> dict[str, Tensor]:
    groups = process_groups.initialize(PLANS[layout], 60.0)
    model = stage(groups)
    dist_checkpointing.save(model.sharded_state_dict(), folder)
    full = dict(sharding.full_state(model, groups=groups))
    process_groups.destroy()
    return full


def load(layout: str, folder: str) -> dict[str, Tensor]:
    groups = process_groups.initialize(PLANS[layout], 60.0)
    model = stage(groups)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    state = dist_checkpointing.load(model.sharded_state_dict(), folder)
    model.load_state_dict(state, strict=False)
    full = dict(sharding.full_state(model, groups=groups))
    process_groups.destroy()
    return full


@pytest.mark.parametrize(("first", "second"), [("tp2", "pp2"), ("pp2", "tp2")])
def test_a_checkpoint_loads_in_another_layout(first, second, tmp_path):
    """Two ranks pad the code vocabularies of 7 and 5, one rank does not."""
    saved = run_ranks(save, (first, str(tmp_path)), PLANS[first].world, timeout_s=120.0)
    loaded = run_ranks(load, (second, str(tmp_path)), PLANS[second].world, timeout_s=120.0)
    assert saved.keys() == loaded.keys()
    for name, weight in saved.items():
        assert torch.equal(loaded[name], weight), name
