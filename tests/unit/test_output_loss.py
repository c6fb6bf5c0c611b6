"""Output layers with their cross-entropy against the plain form, cut into chunks or not."""

import pytest
import torch
from torch.nn import functional as F

from megatron_asvr.errors import AsvrError
from megatron_asvr.model import output_loss as module
from megatron_asvr.model.output_loss import OutputLayer, chunks, output_loss

SIZES = (7, 5, 12)
WIDTH, ROWS = 8, 11


def inputs(rows=ROWS, dtype=torch.float32, scale=1.0):
    """Input, parameters and targets of three output layers, the last one without a bias."""
    generator = torch.Generator().manual_seed(0)
    x_DME = torch.randn(len(SIZES), rows, WIDTH, generator=generator)
    parameters = [torch.randn(size, WIDTH, generator=generator) for size in SIZES]
    parameters += [torch.randn(size, generator=generator) for size in SIZES[:-1]]
    targets = [torch.randint(size, (rows,), generator=generator) for size in SIZES]
    leaves = [(scale * x).to(dtype).requires_grad_() for x in (x_DME, *parameters)]
    return leaves, torch.stack(targets, 1)


def fused(leaves, targets_MD, scales=None):
    x_DME, *parameters = leaves
    biases = [*parameters[len(SIZES) :], None]
    layers = [
        OutputLayer(weight, bias, 0, size)
        for weight, bias, size in zip(parameters, biases, SIZES, strict=False)
    ]
    return output_loss(x_DME, layers, targets_MD, tp=None, scales=scales)


def plain(leaves, targets_MD):
    x_DME, *parameters = [x.float() for x in leaves]  # logits are never rounded to bf16
    biases = [*parameters[len(SIZES) :], None]
    logits = [F.linear(x, w, b) for x, w, b in zip(x_DME, parameters, biases, strict=False)]
    sums = [F.cross_entropy(x, targets_MD[:, d], reduction="sum") for d, x in enumerate(logits)]
    top = [  # ties count
        (x.gather(1, targets_MD[:, d : d + 1]) == x.amax(1, keepdim=True)).sum()
        for d, x in enumerate(logits)
    ]
    return torch.stack(sums), torch.stack(top)


def compare(leaves, targets_MD, *, tolerance):
    """Losses, targets on top, and gradients relative to their norm, under a weight per depth."""
    weights_D = torch.tensor([0.3, -2.0, 1.1])
    got, wanted = fused(leaves, targets_MD), plain(leaves, targets_MD)
    torch.testing.assert_close(got[0], wanted[0], rtol=tolerance, atol=tolerance)
    assert torch.equal(got[1], wanted[1])
    pairs = [torch.autograd.grad((sums * weights_D).sum(), leaves) for sums, _ in (got, wanted)]
    for a, b in zip(*pairs, strict=True):
        assert (a - b).float().norm() <= tolerance * b.float().norm()


@pytest.mark.parametrize("chunk_bytes", [2**26, 4 * 3 * max(SIZES), 4])
def test_losses_and_gradients_are_those_of_the_plain_form(chunk_bytes, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    compare(*inputs(), tolerance=1e-6)  # measured 2e-7


def test_peaked_logits_lose_no_digits():
    compare(*inputs(scale=8.0), tolerance=1e-6)


def test_bf16_adds_up_chunks_in_fp32(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4)  # one position at a time
    leaves, targets_MD = inputs(rows=600, dtype=torch.bfloat16)
    compare(leaves, targets_MD, tolerance=8e-3)  # bf16 has 8 bits


def test_frozen_layers_pass_the_gradient_on():
    leaves, targets_MD = inputs()
    wanted = torch.autograd.grad(fused(leaves, targets_MD)[0].sum(), leaves[0])[0]
    frozen = [leaves[0], *(x.detach() for x in leaves[1:])]
    fused(frozen, targets_MD)[0].sum().backward()
    assert torch.equal(leaves[0].grad, wanted)
    with torch.no_grad():
        assert not fused(leaves, targets_MD)[0].requires_grad


def test_without_positions_everything_is_zero_even_where_the_loss_is_nan():
    leaves, targets_MD = inputs(rows=0)
    sums, top = fused(leaves, targets_MD)
    assert sums.tolist() == [0.0] * 3
    assert top.tolist() == [0] * 3
    (sums.sum() * float("nan")).backward()
    assert all(x.grad.eq(0).all() for x in leaves)


def test_chunks_cover_all_positions_and_keep_their_size():
    layer = OutputLayer(torch.empty(2**14, 1), None, 0, 2**14)
    for positions in (0, 1, 1024, 1025, 5000):
        parts = chunks(positions, layer)
        assert [m for part in parts for m in range(positions)[part]] == list(range(positions))
        assert all(0 < part.stop - part.start <= 1024 for part in parts)


def test_a_second_backward_pass_is_refused():
    leaves, targets_MD = inputs()
    sums, _ = fused(leaves, targets_MD)
    sums.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        sums.sum().backward()


def with_buffers(leaves):
    """The leaves, whose parameters have gradient buffers, as in megatron-core, that are full."""
    for leaf in leaves[1:]:
        leaf.main_grad = torch.ones_like(leaf, dtype=torch.float32)
    return leaves


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("chunk_bytes", [2**26, 4 * 3 * max(SIZES), 4])
def test_gradients_of_a_known_loss_are_added_to_the_buffers(
    chunk_bytes, dtype, tolerance, monkeypatch
):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    scales = [0.25, -2.0, 1.5]
    leaves, targets_MD = inputs(dtype=dtype)
    wanted = torch.autograd.grad(
        (plain(leaves, targets_MD)[0] * torch.tensor(scales)).sum(), leaves
    )
    sums, _ = fused(with_buffers(leaves), targets_MD, scales)
    (sums * torch.tensor(scales)).sum().backward()
    got = [leaves[0].grad, *(leaf.main_grad - 1 for leaf in leaves[1:])]
    assert all(leaf.grad is None for leaf in leaves[1:])
    for a, b in zip(got, wanted, strict=True):
        # The buffers' ones cost a digit of small gradients.
        assert (a - b).float().norm() <= tolerance * (b.float().norm() + 1)


def test_only_parameters_with_a_buffer_and_a_gradient_are_added_to():
    leaves, targets_MD = inputs()
    scales = [1.0, 1.0, 1.0]
    wanted = torch.autograd.grad(fused(leaves, targets_MD)[0].sum(), leaves)
    fused(leaves, targets_MD, scales)[0].sum().backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, wanted, strict=True))
    with_buffers(leaves)[1].requires_grad_(False)
    with torch.no_grad():
        fused(leaves, targets_MD, scales)
    assert all(leaf.main_grad.eq(1).all() for leaf in leaves[1:])
    fused(leaves, targets_MD, scales)[0].sum().backward()
    assert [bool(leaf.main_grad.eq(1).all()) for leaf in leaves[1:3]] == [True, False]


def test_a_loss_that_is_not_the_known_one_is_refused():
    leaves, targets_MD = inputs()
    sums, _ = fused(leaves, targets_MD, [1.0, 1.0, 1.0])
    with pytest.raises(AsvrError, match="must be linear in its sums"):
        (sums * torch.tensor([1.0, 1.0, 1.1])).sum().backward()
    sums, _ = fused(leaves, targets_MD, [float("nan")] * 3)
    (sums.sum() * float("nan")).backward()


@pytest.mark.parametrize("scales", [None, [1.0, 1.0, 1.0]])
def test_what_waits_for_the_backward_pass_does_not_grow_with_a_vocabulary(scales):
    held = []
    for words in (1, 2):
        leaves, targets_MD = inputs()
        for place, size in enumerate(SIZES, 1):
            leaves[place] = torch.zeros(words * 64 * size, WIDTH, requires_grad=True)
        layers = [OutputLayer(w, None, 0, len(w)) for w in with_buffers(leaves)[1:4]]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x
        ):
            output_loss(leaves[0], layers, targets_MD, tp=None, scales=scales)
        held.append(sum(kept))
    assert (held[0] == held[1] == leaves[0].numel()) == (scales is not None)
