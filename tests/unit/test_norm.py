"""The root-mean-square norm against torch's own, and where torch's own is used."""

from megatron_asvr.platforms import kernels

import pytest
import torch
from torch.nn import functional as F

from megatron_asvr.precision import norm
from megatron_asvr.precision.norm import RMSNorm

WIDTH = 24


@pytest.fixture(autouse=True, params=[False, True], ids=["torch", "kernel"])
def _by(request):
    assert kernels.use(request.param)[0] == request.param


def build(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = RMSNorm(WIDTH, eps=1e-3, dtype=dtype)
    with torch.no_grad():
        made.weight.copy_(torch.randn(WIDTH, generator=generator))
    return made


def compare(made, x):
    """Output and gradients, relative to their norm."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(x.shape, generator=generator).to(x.dtype)
    leaves = (x, made.weight)
    wanted = F.rms_norm(x, (WIDTH,), made.weight, made.eps)
    got = made(x)
    assert got.dtype == wanted.dtype
    pairs = [(got, wanted)]
    pairs += zip(
        torch.autograd.grad(got, leaves, grad),
        torch.autograd.grad(wanted, leaves, grad),
        strict=True,
    )
    for a, b in pairs:
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("shape", [(5, 3, WIDTH), (WIDTH,), (0, WIDTH), (20000, WIDTH)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e8])
def test_output_and_gradients_are_those_of_torch(shape, scale):
    x = scale * torch.randn(shape, generator=torch.Generator().manual_seed(2))
    compare(build(), x.requires_grad_())


def test_memory_may_be_in_any_order_and_zero_is_no_special_case():
    x = torch.randn(4, WIDTH, 5).transpose(1, 2).requires_grad_()
    compare(build(), x)
    compare(build(), torch.zeros(3, WIDTH, requires_grad=True))


def test_a_frozen_weight_gets_no_gradient():
    made = build()
    x = torch.randn(3, WIDTH, requires_grad=True)
    wanted = torch.autograd.grad(made(x).sum(), x)[0]
    made.requires_grad_(False)
    made(x).sum().backward()
    assert torch.equal(x.grad, wanted)
    assert made.weight.grad is None


def test_other_precisions_are_torchs(monkeypatch):
    kernels.use(False)
    monkeypatch.delattr(norm, "_Norm")
    x = torch.randn(3, WIDTH, dtype=torch.bfloat16)
    made = build(torch.bfloat16)
    assert torch.equal(made(x), F.rms_norm(x, (WIDTH,), made.weight, made.eps))
