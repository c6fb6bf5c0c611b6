"""Cross-entropy and the arithmetic of the joint objective."""

import math

import pytest
import torch
from torch.nn import functional as F

from megatron_asvr.model.loss import (
    LossSums,
    cross_entropy,
    joint_loss,
    official_loss,
    read_totals,
)


def random_logits(*sizes, rows=11, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = [5 * torch.randn(rows, k, generator=generator, dtype=dtype) for k in sizes]
    targets = [torch.randint(k, (rows,), generator=generator) for k in sizes]
    return [x.requires_grad_() for x in logits], torch.stack(targets, 1)


def test_cross_entropy_is_that_of_torch():
    logits, targets_MD = random_logits(7, 4)
    ce_DM, correct_DM = cross_entropy(logits, targets_MD, tp=None)
    weights_DM = torch.rand(2, 11)
    got = torch.autograd.grad((ce_DM * weights_DM).sum(), logits)
    wanted_DM = torch.stack(
        [F.cross_entropy(x, targets_MD[:, d], reduction="none") for d, x in enumerate(logits)]
    )
    wanted = torch.autograd.grad((wanted_DM * weights_DM).sum(), logits)
    torch.testing.assert_close(ce_DM, wanted_DM)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for depth, x in enumerate(logits):
        assert torch.equal(correct_DM[depth], x.argmax(1) == targets_MD[:, depth])


def test_cross_entropy_gradient_is_its_derivative():
    logits, targets_MD = random_logits(5, 3, rows=4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: cross_entropy(x, targets_MD, tp=None)[0], tuple(logits)
    )


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4]], requires_grad=True)
    ce_DM, _ = cross_entropy([logits], torch.tensor([[0], [1]]), tp=None)
    assert ce_DM.tolist() == [[0.0, 2e4]]


def test_no_targets_give_zero_loss_and_zero_gradient():
    weight = torch.randn(5, 3, requires_grad=True)
    logits = F.linear(torch.zeros(0, 3), weight)
    ce_DM, _ = cross_entropy([logits], torch.zeros(0, 1, dtype=torch.int64), tp=None)
    assert ce_DM.sum() == 0
    ce_DM.sum().backward()
    assert weight.grad.abs().max() == 0


def sums(text=(6.0, 3), visual=((4.0, 8.0), 4)):
    visual_sum_D = torch.tensor(visual[0])
    return LossSums(
        text_sum=torch.tensor(text[0], requires_grad=True),
        text_count=text[1],
        text_correct=torch.tensor(2),
        visual_sum_D=visual_sum_D.requires_grad_(),
        visual_count=visual[1],
        visual_correct_D=torch.tensor([1] * len(visual_sum_D)),
        codes_MD=None,
    )


def test_parts_of_micro_batches_add_up_to_the_global_loss():
    parts = [sums(), sums((0.0, 0), ((2.0, 2.0), 1)), sums((3.0, 6), ((0.0, 0.0), 0))]
    loss = sum(
        joint_loss(part, global_text_count=9, global_visual_count=5, visual_weight=0.5)
        for part in parts
    )
    text, visual = (6 + 3) / 9, ((4 + 2) / 5 + (8 + 2) / 5) / 2
    assert loss.item() == pytest.approx(text + 0.5 * visual)


def test_exact_mode_is_zero_without_targets():
    empty = sums((0.0, 0), ((0.0, 0.0), 0))
    loss = joint_loss(empty, global_text_count=0, global_visual_count=0, visual_weight=1.0)
    assert loss.item() == 0
    loss.backward()
    assert empty.text_sum.grad.isfinite()


def test_the_baseline_has_no_visual_term():
    part = sums(visual=((), 0))
    loss = joint_loss(part, global_text_count=3, global_visual_count=0, visual_weight=0.0)
    assert loss.item() == 2.0


def test_official_mode_divides_by_eight_and_gives_nan_without_text():
    loss = official_loss(sums(), visual_weight=1.0)
    assert loss.item() == pytest.approx(6 / 3 + (4 + 8) / 4 / 8)
    assert official_loss(sums(visual=((0.0, 0.0), 0)), visual_weight=1.0).item() == 2.0
    assert math.isnan(official_loss(sums(text=(0.0, 0)), visual_weight=1.0).item())


def test_totals_add_up_and_read_back():
    total = sums().totals() + sums((0.0, 0), ((2.0, 2.0), 1)).totals()
    assert read_totals(total) == pytest.approx(
        {
            "text_loss": 2.0,
            "text_accuracy": 4 / 3,
            "text_targets": 3,
            "visual_loss": (6 / 5 + 10 / 5) / 2,
            "visual_targets": 5,
            "visual_loss_0": 6 / 5,
            "visual_loss_1": 10 / 5,
            "visual_accuracy_0": 2 / 5,
            "visual_accuracy_1": 2 / 5,
        }
    )
    assert read_totals(sums((0.0, 0), ((), 0)).totals())["text_loss"] == 0
