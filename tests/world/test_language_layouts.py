"""Every layout of the ranks computes the loss and the gradients of one rank."""

import dataclasses
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron)

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megatron_asvr.launch.local import run_ranks
from megatron_asvr.model import sharding
from megatron_asvr.model.language import LanguageModel, gather_positions
from megatron_asvr.parallel import groups as process_groups
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.plan import ParallelPlan
from tests.language_cases import CASES, SMALL, build, one_rank, rule_batch

pytestmark = pytest.mark.world

VIRTUAL = dataclasses.replace(SMALL, num_layers=4)
ALL = CASES | {"virtual": VIRTUAL}
NUM_MICRO_BATCHES = 4
PLANS = {
    "tp2": ParallelPlan(tp=2, world=2),
    "tp2_sp": ParallelPlan(tp=2, sp=True, world=2),
    "pp2": ParallelPlan(pp=2, world=2),
    "pp2_vpp2": ParallelPlan(pp=2, vpp=2, world=2),
    "tp2_pp2_sp": ParallelPlan(tp=2, pp=2, sp=True, world=4),
}


def micro_batches(vocab_size: int) -> list[dict[str, Tensor]]:
    """Rows with two questions behind a prefix, two documents, and padding."""
    made = []
    for seed in range(NUM_MICRO_BATCHES):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(vocab_size, (2, 16), generator=generator)
        document = torch.tensor([[0] * 14 + [-1] * 2, [0] * 9 + [1] * 7], dtype=torch.int32)
        branch = torch.tensor([[0] * 5 + [1] * 5 + [2] * 4 + [0] * 2, [0] * 16], dtype=torch.int32)
        position = torch.tensor(
            [[*range(10), *range(5, 9), 0, 0], [*range(9), *range(7)]], dtype=torch.int64
        )
        rows = torch.randperm(32, generator=generator)[:13]  # positions with a target, S-major
        targets = torch.randint(vocab_size, (13,), generator=generator)
        made.append(
            {
                "tokens": tokens,
                "document": document,
                "branch": branch,
                "position": position,
                "rows": rows,
                "targets": targets,
            }
        )
    return made


def forward_step(batches: Any, model: LanguageModel) -> tuple[Tensor, Any]:
    batch = next(batches)
    embeds = model.embed(batch["tokens"]) if model.pre_process else None
    mask = model.mask(rule_batch(batch["document"], batch["branch"], batch["position"]))
    hidden_SBH = model(embeds, batch["position"], mask)
    if not model.post_process:
        return hidden_SBH, None
    hidden_SBH = gather_positions(hidden_SBH, groups=model.groups)
    logits_XV = model.logits(hidden_SBH.flatten(0, 1)[batch["rows"]])
    losses_X = vocab_parallel_cross_entropy(logits_XV, batch["targets"])

    def loss_function(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = losses.sum() / (13 * NUM_MICRO_BATCHES)
        exact = losses.detach().double().sum() / (13 * NUM_MICRO_BATCHES)
        return total, torch.tensor(13, dtype=torch.int), {"loss": exact}

    return losses_X, loss_function


def loss_and_gradients(case: str, groups: Groups) -> tuple[float, dict[str, Tensor]]:
    """The loss and the full gradients by canonical name, on every rank."""
    config, plan = ALL[case], groups.plan
    chunks = [build(config, groups, vp_stage=i) for i in range(plan.vpp or 1)]
    batches = micro_batches(config.vocab_size)
    data = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=NUM_MICRO_BATCHES,
        seq_length=16,
        micro_batch_size=2,
        decoder_seq_length=16,
        forward_only=False,
    )
    loss = (
        torch.stack([x["loss"] for x in data]).sum()
        if data
        else torch.zeros((), dtype=torch.float64)
    )
    if plan.pp > 1:
        dist.all_reduce(loss, group=groups.pp)
    for chunk in chunks:
        finish_gradients(chunk, groups)
    return loss.item(), dict(sharding.full_state(chunks, groups=groups))


def finish_gradients(model: LanguageModel, groups: Groups) -> None:
    """Put the gradients where the weights were, after the sums that the optimizer step makes."""
    names = sharding.canonical_names(model)
    for local, parameter in model.named_parameters():
        gradient = parameter.grad
        # megatron-core's rule, distributed/finalize_model_grads.py
        sequence_parallel = groups.plan.sp and getattr(parameter, "sequence_parallel", False)
        per_head = model.config.qk_layernorm and ("q_layernorm" in local or "k_layernorm" in local)
        if sequence_parallel or per_head:
            dist.all_reduce(gradient, group=groups.tp)
        tied = model.share_embeddings_and_output_weights and "embedding" in names[local]
        if tied and groups.plan.pp > 1:
            dist.all_reduce(gradient, group=groups.pp)
        parameter.data = gradient


def on_ranks(layout: str, cases: list[str]) -> dict[str, tuple[float, dict[str, Tensor]]]:
    groups = process_groups.initialize(PLANS[layout], 60.0)
    found = {case: loss_and_gradients(case, groups) for case in cases}
    process_groups.destroy()
    return found


@pytest.fixture(scope="module")
def expected():
    with one_rank() as groups:
        return {case: loss_and_gradients(case, groups) for case in ALL}


@pytest.mark.parametrize(
    ("layout", "cases"),
    [
        ("tp2", list(CASES)),
        ("tp2_sp", list(CASES)),
        ("pp2", list(CASES)),
        ("pp2_vpp2", ["virtual"]),
        ("tp2_pp2_sp", ["qwen2", "qwen3"]),
    ],
)
def test_layouts_agree_with_one_rank(layout, cases, expected):
    found = run_ranks(on_ranks, (layout, cases), PLANS[layout].world, timeout_s=120.0)
    for case in cases:
        (loss, gradients), (got_loss, got) = expected[case], found[case]
        assert abs(got_loss - loss) <= 1e-6 * loss, case  # measured 1.4e-8
        assert got.keys() == gradients.keys()
        everything = torch.stack([g.norm() for g in gradients.values()]).norm()
        for name, gradient in gradients.items():
            # measured at most 2e-6 of the larger norm
            limit = 1e-5 * max(gradient.norm(), 1e-3 * everything)
            error = (got[name] - gradient).norm()
            assert error <= limit, f"{layout} {case} {name}: {error} over {limit}"


def weights_on_ranks(case: str) -> dict[str, Tensor]:
    """Full weights before and after loading them into a second model."""
    groups = process_groups.initialize(ParallelPlan(tp=2, world=2), 60.0)
    first = dict(sharding.full_state(build(ALL[case], groups), groups=groups))
    second = LanguageModel(ALL[case], groups=groups, dtype=torch.float32)
    sharding.load_weights(second, first.get, groups=groups)
    again = dict(sharding.full_state(second, groups=groups))
    assert all(torch.equal(again[name], x) for name, x in first.items())
    process_groups.destroy()
    return first


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
def test_weights_do_not_depend_on_the_layout(case):
    with one_rank() as groups:
        wanted = dict(sharding.full_state(build(ALL[case], groups), groups=groups))
    found = run_ranks(weights_on_ranks, (case,), 2, timeout_s=120.0)
    assert list(found) == list(wanted)
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name
