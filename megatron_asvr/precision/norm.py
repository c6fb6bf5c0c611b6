"""Root-mean-square norm whose backward pass takes few passes over memory.

For fp32 on a CPU torch has only single operations (docs/performance.md has the cost of both); for
everything else its own are used. Where there are kernels (``platforms/kernels.cpp``), one reads a
row once and keeps nothing but the input.
"""

from typing import Any

from megatron_asvr.platforms import kernels

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_asvr.precision.remake import remember


class RMSNorm(torch.nn.RMSNorm):
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimension, as in torch."""

    def forward(self, x: Tensor) -> Tensor:
        """The norm of ``x``, of its shape and dtype."""
        if kernels.fit(x, self.weight):
            kept, weight, eps = x.detach(), self.weight.detach(), self.eps
            y = _ByKernel.apply(x, self.weight, eps)
            return remember(y, lambda: _by_kernel(kept, weight, eps))
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return super().forward(x)
        y, inverse = _Norm.apply(x, self.weight, self.eps)
        kept, weight = x.detach(), self.weight.detach()
        return remember(y, lambda: (kept * inverse).mul_(weight))


def one_node(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``RMSNorm`` as one node of the graph, which keeps ``x`` and an inverse root for each row.

    Args:
        x: [..., width].
        weight: [width].
        eps: added to the mean square.
    """
    return _Norm.apply(x, weight, eps)[0]


def _by_kernel(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, width = x.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    kernels.call("norm", [x, weight, y], x.numel() // width, width, float(eps))
    return y


class _ByKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _by_kernel(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = (kept.contiguous() for kept in ctx.saved_tensors)
        width = x.shape[-1]
        grad_x = torch.empty_like(x)
        grad_weight = torch.empty_like(weight, dtype=torch.float32)
        tensors = [x, grad.contiguous(), weight, grad_x, grad_weight]
        kernels.call("norm_backward", tensors, x.numel() // width, width, float(ctx.eps))
        return grad_x, grad_weight if ctx.needs_input_grad[1] else None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.mark_non_differentiable(inverse)
        return (x * inverse).mul_(weight), inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        width = x.shape[-1]
        x_MN, grad_MN = x.reshape(-1, width), grad.reshape(-1, width)
        inverse_M1 = inverse.reshape(-1, 1)
        product_MN = grad_MN * x_MN
        along_M1 = torch.mv(product_MN, weight)[:, None] * inverse_M1.square()
        # A sum, no product with a vector: torch sums in pairs, so thousands of rows lose no digit.
        grad_weight = product_MN.mul_(inverse_M1).sum(0) if ctx.needs_input_grad[1] else None
        grad_x = torch.mul(grad_MN, weight, out=product_MN)
        grad_x.addcmul_(x_MN, along_M1, value=-1.0 / width).mul_(inverse_M1)
        return grad_x.view(x.shape), grad_weight, None
