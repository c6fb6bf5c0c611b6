"""Output layers split over ranks, cut into chunks or not, against the plain form on one rank."""

from typing import Any

from megatron_asvr.platforms import kernels

import pytest
import torch
from torch.nn import functional as F

from megatron_asvr.config.schema import VisualHeadConfig
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.model import output_loss as module
from megatron_asvr.model import visual_head
from megatron_asvr.model.output_loss import OutputLayer, output_loss
from megatron_asvr.model.visual_head import VisualHead
from megatron_asvr.parallel import groups as process_groups
from megatron_asvr.parallel.collectives import copy_to_tp
from megatron_asvr.parallel.plan import ParallelPlan

pytestmark = pytest.mark.world

SIZES = (9, 1)  # of two ranks the second has 4 words of 5 rows, and none of 1
WIDTH, ROWS, RANKS = 8, 11, 2


def compare(with_kernels: bool) -> None:
    """Runs on every rank; each compares its rows of the weights' gradients."""
    assert kernels.use(with_kernels)[0] == with_kernels
    tp = process_groups.initialize(ParallelPlan(tp=RANKS, world=RANKS), 60.0).tp
    generator = torch.Generator().manual_seed(0)
    x_DME = torch.randn(len(SIZES), ROWS, WIDTH, generator=generator, requires_grad=True)
    full = [torch.randn(size, WIDTH, generator=generator, requires_grad=True) for size in SIZES]
    targets_MD = torch.stack([torch.randint(k, (ROWS,), generator=generator) for k in SIZES], 1)
    logits = [F.linear(x, weight) for x, weight in zip(x_DME, full, strict=True)]
    wanted_D = torch.stack(
        [F.cross_entropy(x, targets_MD[:, d], reduction="sum") for d, x in enumerate(logits)]
    )
    wanted_D[0].mul(2).add(wanted_D[1]).backward()
    wanted: list[Any] = [x_DME.grad.clone(), *(weight.grad for weight in full)]
    x_DME.grad = None
    for chunk_bytes, scales in ((2**26, None), (4, None), (2**26, [2.0, 1.0]), (4, [2.0, 1.0])):
        module.CHUNK_BYTES = chunk_bytes
        own, layers = [], []
        for weight in full:
            rows = -(-len(weight) // RANKS)
            padded = F.pad(weight.detach(), (0, 0, 0, RANKS * rows - len(weight)), value=9.0)
            own.append(padded[tp.rank() * rows :][:rows].clone().requires_grad_())
            layers.append(OutputLayer(own[-1], None, tp.rank() * rows, len(weight)))
            if scales:
                own[-1].main_grad = torch.zeros_like(own[-1])
        entered = copy_to_tp(x_DME, group=tp)
        sum_D, _ = output_loss(entered, layers, targets_MD, tp=tp, scales=scales)
        torch.testing.assert_close(sum_D, wanted_D, rtol=1e-6, atol=1e-6)
        sum_D[0].mul(2).add(sum_D[1]).backward()
        assert (x_DME.grad - wanted[0]).norm() <= 1e-6 * wanted[0].norm()
        x_DME.grad = None
        for layer, gradient in zip(layers, wanted[1:], strict=True):
            mine = gradient[layer.first :][: len(layer.weight)]
            got = layer.weight.main_grad if scales else layer.weight.grad
            assert (got[: len(mine)] - mine).norm() <= 1e-6 * max(gradient.norm(), 1.0)
            assert not got[len(mine) :].any()  # padding


def compare_head(with_kernels: bool) -> None:
    """Runs on every rank: a head, position by position, against all positions at once."""
    assert kernels.use(with_kernels)[0] == with_kernels
    tp = process_groups.initialize(ParallelPlan(tp=RANKS, world=RANKS), 60.0).tp
    torch.manual_seed(tp.rank())  # replicated weights may differ: both ways read the same ones
    config = VisualHeadConfig(width=16, num_layers=2, num_heads=4, init_std=0.3)
    tables = [torch.randn(size, 9) for size in (9, 7, 2)]
    head = VisualHead(config, 12, tables, tp=tp, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    hidden_MH = torch.randn(ROWS, 12, generator=generator, requires_grad=True)
    codes_MD = torch.stack([torch.randint(2, (ROWS,), generator=generator) for _ in tables], 1)
    scales = [0.25, -2.0, 1.5]
    wanted_D, _ = head.loss(hidden_MH, codes_MD)
    leaves = [hidden_MH, *head.parameters()]
    wanted = torch.autograd.grad(wanted_D, leaves, torch.tensor(scales))
    for parameter in head.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    visual_head.PART_BYTES = 1
    got_D, _ = head.loss(hidden_MH, codes_MD, scales)
    torch.testing.assert_close(got_D, wanted_D, rtol=1e-6, atol=1e-6)
    got_D.backward(torch.tensor(scales))
    for leaf, gradient in zip(leaves, wanted, strict=True):
        got = leaf.main_grad if leaf.grad is None else leaf.grad
        assert (got - gradient).norm() <= 1e-6 * max(gradient.norm(), 1.0)


@pytest.mark.parametrize("with_kernels", [True, False])
def test_two_ranks_take_a_head_position_by_position(with_kernels):
    run_ranks(compare_head, (with_kernels,), world_size=RANKS, timeout_s=120)


@pytest.mark.parametrize("with_kernels", [True, False])
def test_two_ranks_compute_the_plain_form_also_without_any_word(with_kernels):
    run_ranks(compare, (with_kernels,), world_size=RANKS, timeout_s=120)
