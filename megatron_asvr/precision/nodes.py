"""Rotation of queries and keys, and the gated activation, each as one node of the graph.

Torch's own operations keep what each of them needs and pass over memory once for each; these keep
their input, or nothing, and take few passes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron_asvr.precision.remake import remember


def gated(x: Tensor) -> Tensor:
    """``silu(a) * b`` of the two halves of the last dimension.

    Args:
        x: [..., 2 f].
    """
    kept = x.detach()
    return remember(_Gated.apply(x), lambda: _gated(kept))


def rotated(x_SBGNC: Tensor, angle_SBC: Tensor, *, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Heads of every group, told apart: all but those of the last part turned by their positions.

    Args:
        x_SBGNC: N heads of G groups, of width C.
        angle_SBC: in radians; both halves of the last dimension are the same.
        sizes: heads of each part; they add up to N, and the last part may be empty.
    """
    half = angle_SBC[:, :, None, None, : angle_SBC.shape[-1] // 2]
    cos, sin = half.cos().to(x_SBGNC.dtype), half.sin().to(x_SBGNC.dtype)
    return _Rotated.apply(x_SBGNC, cos, sin, sizes)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gated(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        (a, b), (grad_a, grad_b) = x.chunk(2, -1), grad_x.chunk(2, -1)
        torch.ops.aten.silu.out(a, out=grad_b)
        grad_b.mul_(grad)
        torch.ops.aten.silu_backward.grad_input(grad * b, a, grad_input=grad_a)
        return grad_x


def _gated(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return F.silu(a).mul_(b)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, sizes: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.sizes = sizes
        *turned, kept = x.split(sizes, -2)
        results = [part.new_empty(part.shape) for part in turned]
        for part, result in zip(turned, results, strict=True):
            _turn(part, cos, sin, result)
        return *results, kept.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        shape = (*grads[0].shape[:-2], sum(ctx.sizes), grads[0].shape[-1])
        grad_x = grads[0].new_empty(shape)
        *turned, kept = grad_x.split(ctx.sizes, -2)
        for grad, part in zip(grads[:-1], turned, strict=True):
            _turn(grad, cos, -sin, part)
        kept.copy_(grads[-1])
        return grad_x, None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Turn each pair (i, i + C / 2) of the last dimension by its angle."""
    (a, b), (out_a, out_b) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1.0)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
