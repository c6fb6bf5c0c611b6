"""The visual head against a plain reference, and its behaviour at the edges."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from megatron_asvr.config.schema import VisualHeadConfig
from megatron_asvr.errors import AsvrError, ConfigError
from megatron_asvr.model import visual_head as module
from megatron_asvr.model.visual_head import VisualHead, split_attention

SIZES = (7, 5, 6)  # codewords of each depth
CONFIG = VisualHeadConfig(width=16, num_layers=2, num_heads=4, init_std=0.3)
HIDDEN = 12


def build(config=CONFIG, sizes=SIZES):
    torch.manual_seed(0)
    tables = [torch.randn(size, 9) for size in sizes]
    head = VisualHead(config, HIDDEN, tables, tp=None, dtype=torch.float32)
    with torch.no_grad():  # move norms and biases away from one and zero
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return head


def inputs(num, sizes=SIZES):
    generator = torch.Generator().manual_seed(1)
    codes = [torch.randint(size, (num,), generator=generator) for size in sizes]
    return torch.randn(num, HIDDEN, generator=generator), torch.stack(codes, 1)


def reference(head, hidden_H, codes_D):
    """Logits of one position, written as the formulas of the module's docstring."""

    def norm(module, x):
        return module.weight * x / (x.square().mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt()

    projector = head.projector
    rows = [projector.linear_2(F.gelu(projector.linear_1(hidden_H)))]
    total = torch.zeros(9)
    for depth in range(len(codes_D) - 1):
        total = total + head.codebooks[depth][codes_D[depth]]
        rows.append(head.code_projection.weight @ total + head.code_projection.bias)
    x_DE = torch.stack(rows)
    hidden = torch.ones(len(rows), len(rows)).triu(1).bool()
    for layer in head.layers:
        theirs = nn.MultiheadAttention(CONFIG.width, CONFIG.heads)
        theirs.load_state_dict(
            {
                "in_proj_weight": layer.attention.in_proj.weight.flatten(0, 1),
                "in_proj_bias": layer.attention.in_proj.bias.flatten(),
                "out_proj.weight": layer.attention.out_proj.weight,
                "out_proj.bias": layer.attention.out_proj.bias,
            }
        )
        normed = norm(layer.norm1, x_DE)
        attended, _ = theirs(normed, normed, normed, attn_mask=hidden)
        r_DE = norm(layer.norm2, x_DE + attended)
        mlp = [
            layer.mlp.w2[depth] @ F.gelu(layer.mlp.w1[depth] @ r_DE[depth])
            for depth in range(len(rows))
        ]
        x_DE = r_DE + torch.stack(mlp)
    x_DE = norm(head.norm, x_DE)
    return [out.weight @ x_E + out.bias for out, x_E in zip(head.heads, x_DE, strict=True)]


def test_logits_follow_the_formulas():
    head = build()
    hidden_MH, codes_MD = inputs(5)
    logits = head(hidden_MH, codes_MD)
    assert [tuple(x.shape) for x in logits] == [(5, 7), (5, 5), (5, 6)]
    for m in range(5):
        for got, wanted in zip(logits, reference(head, hidden_MH[m], codes_MD[m]), strict=True):
            torch.testing.assert_close(got[m], wanted, rtol=1e-5, atol=1e-5)


def test_a_depth_sees_only_the_codes_before_it():
    head = build()
    hidden_MH, codes_MD = inputs(4)
    before = head(hidden_MH, codes_MD)
    for depth in range(3):
        changed = codes_MD.clone()
        changed[:, depth] = (changed[:, depth] + 1) % SIZES[depth]
        same = [torch.equal(a, b) for a, b in zip(before, head(hidden_MH, changed), strict=True)]
        assert same == [later <= depth for later in range(3)]


@pytest.mark.parametrize(("num", "sizes"), [(0, SIZES), (3, (7,)), (0, (7,))])
def test_every_parameter_gets_a_gradient_whatever_the_sizes(num, sizes):
    head = build(sizes=sizes)
    hidden_MH, codes_MD = inputs(num, sizes)
    hidden_MH.requires_grad_()
    sum(logits.sum() for logits in head(hidden_MH, codes_MD)).backward()
    assert hidden_MH.grad.shape == (num, HIDDEN)
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
        if not num:
            assert parameter.grad.abs().max() == 0


def test_codebooks_stay_fp32_and_out_of_the_state():
    head = build()
    before = head.codebooks[1].clone()
    head.bfloat16()
    assert head.norm.weight.dtype == torch.bfloat16
    assert torch.equal(head.codebooks[1], before)
    assert not any("codebooks" in name for name in head.state_dict())
    hidden_MH, codes_MD = inputs(2)
    assert {x.dtype for x in head(hidden_MH.bfloat16(), codes_MD)} == {torch.float32}


def test_attention_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match=r"num_heads=3 does not divide .*use one of 1, 2, 4"):
        split_attention(dataclasses.replace(CONFIG, num_heads=3), None)


def test_the_number_of_heads_has_a_default():
    assert VisualHeadConfig(width=2048).heads == 16
    assert VisualHeadConfig(width=64).heads == 1
    assert build(VisualHeadConfig(width=16)).layers[0].attention.num_heads == 1


SCALES = [0.25, -2.0, 1.5]


def plain_gradients(head, hidden_MH, codes_MD):
    """Of the scaled losses, from all logits at once; by name, and of the hidden states."""
    sums = [
        F.cross_entropy(logits, codes_MD[:, d], reduction="sum")
        for d, logits in enumerate(head(hidden_MH, codes_MD))
    ]
    loss = (torch.stack(sums) * torch.tensor(SCALES)).sum()
    leaves = {"hidden": hidden_MH, **dict(head.named_parameters())}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return torch.stack(sums), dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("positions", [1, 4, 11, 100])
def test_positions_in_parts_give_the_gradients_of_all_at_once(positions, monkeypatch):
    head = build()
    each = module.KEPT * 2 * len(SIZES) * CONFIG.width * 4
    monkeypatch.setattr(module, "PART_BYTES", positions * each)
    hidden_MH, codes_MD = inputs(11)
    hidden_MH.requires_grad_()
    sums, wanted = plain_gradients(head, hidden_MH, codes_MD)
    for parameter in head.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    runs = []
    head.norm.register_forward_hook(lambda _, __, x_DME: runs.append(x_DME.shape[1]))
    sum_D, _ = head.loss(hidden_MH, codes_MD, SCALES)
    assert max(runs) <= positions
    assert sum(runs) == 11
    torch.testing.assert_close(sum_D, sums, rtol=1e-6, atol=1e-6)
    stored = {name: p.main_grad.clone() for name, p in head.named_parameters()}
    (sum_D * torch.tensor(SCALES)).sum().backward()
    got = {"hidden": hidden_MH.grad}
    for name, parameter in head.named_parameters():
        assert torch.equal(parameter.main_grad, stored[name])  # nothing is left to be done
        # What the output layers do not store, the wrapper's hook adds: here it stays.
        got[name] = stored[name] if parameter.grad is None else parameter.grad
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= 1e-6 * max(gradient.norm(), 1.0), name


def test_a_head_that_was_told_another_loss_refuses_the_backward_pass():
    head = build()
    for parameter in head.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    hidden_MH, codes_MD = inputs(3)
    sum_D, _ = head.loss(hidden_MH.requires_grad_(), codes_MD, SCALES)
    with pytest.raises(AsvrError, match="must be linear in its sums"):
        sum_D.sum().backward()
    empty_MH, none_MD = inputs(0)
    sum_D, top_D = head.loss(empty_MH.requires_grad_(), none_MD, SCALES)
    sum_D.sum().backward()
    assert sum_D.tolist() == [0.0] * 3
    assert top_D.tolist() == [0] * 3
    assert empty_MH.grad.shape == (0, HIDDEN)


def test_without_buffers_or_a_backward_pass_all_positions_go_at_once(monkeypatch):
    monkeypatch.setattr(module, "PART_BYTES", 1)
    head = build()
    runs = []
    head.norm.register_forward_hook(lambda _, __, x_DME: runs.append(x_DME.shape[1]))
    hidden_MH, codes_MD = inputs(3)
    sum_D, _ = head.loss(hidden_MH, codes_MD, SCALES)
    sum_D.backward(torch.tensor(SCALES))
    assert all(p.grad is not None for p in head.parameters())
    for parameter in head.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    with torch.no_grad():
        head.loss(hidden_MH, codes_MD, SCALES)
    head.loss(hidden_MH, codes_MD)
    assert runs == [3, 3, 3]
    assert not any(p.main_grad.any() for p in head.parameters())
