"""Products with weights whose gradients are added to their buffers in the product itself.

megatron-core gives trained weights an fp32 buffer, ``main_grad``, to which gradients of all
micro-batches, and of all parts of the visual head's positions, are added. Torch computes a gradient
into new memory, copies it where it comes out transposed, and adds it in a pass of its own. The
arithmetic is the same. On a CPU, bf16 gradients are not rounded to bf16 on their way.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron_asvr.precision.matmul import add_product

_stores = False  # inside of into_buffers


@contextlib.contextmanager
def into_buffers(wanted: bool = True) -> Iterator[None]:
    """Inside, what is multiplied adds gradients to ``main_grad`` of its weights, and gives none.

    Args:
        wanted: False for passes inside of others, whose gradients are asked for.
    """
    global _stores
    before, _stores = _stores, wanted
    try:
        yield
    finally:
        _stores = before


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``: [..., N].

    Args:
        x: [..., K]; leading dimensions are free.
        weight: [..., K], whose leading dimensions have N rows together.
        bias: as many numbers, or None.
    """
    weight_NK, bias_N = weight.flatten(0, -2), None if bias is None else bias.flatten()
    if not _stored(weight):
        return F.linear(x, weight_NK, bias_N)
    x_1MK, bias_1N = x.flatten(0, -2)[None], None if bias_N is None else bias_N[None]
    y_1MN = _Multiply.apply(x_1MK, weight_NK[None], bias_1N, weight.main_grad)
    return y_1MN.view(*x.shape[:-1], len(weight_NK))


def multiply_each(x_DMK: Tensor, weight_DNK: Tensor) -> Tensor:
    """Each depth's ``x`` times its own matrix, [D, M, N].

    Args:
        x_DMK: inputs.
        weight_DNK: weights.
    """
    if not _stored(weight_DNK):
        return torch.bmm(x_DMK, weight_DNK.mT)
    return _Multiply.apply(x_DMK, weight_DNK, None, weight_DNK.main_grad)


def look_up(weight_VH: Tensor, ids: Tensor) -> Tensor:
    """Rows of a table, [..., H].

    Args:
        weight_VH: the table.
        ids: int64, of any shape.
    """
    if not _stored(weight_VH):
        return F.embedding(ids, weight_VH)
    return _LookUp.apply(ids, weight_VH, weight_VH.main_grad)


def _stored(weight: Tensor) -> bool:
    """Whether the gradient goes into a buffer; on a GPU that of fp32 weights alone."""
    known = weight.dtype == torch.float32 or weight.device.type == "cpu"
    return _stores and weight.requires_grad and known and hasattr(weight, "main_grad")


class _LookUp(torch.autograd.Function):
    """A gradient as large as the table, nearly all zeros, is never made."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight_VH: Tensor, main_grad: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.main_grad = main_grad
        return F.embedding(ids, weight_VH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).to(ctx.main_grad.dtype)
        ctx.main_grad.index_add_(0, ids.flatten(), rows)
        return None, None, None


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_DMK: Tensor, weight_DNK: Tensor, bias_DN: Tensor | None, main_grad: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_DMK, weight_DNK)
        ctx.main_grad = main_grad
        y_DMN = torch.bmm(x_DMK, weight_DNK.mT)
        return y_DMN if bias_DN is None else y_DMN.add_(bias_DN[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_DMN: Tensor) -> tuple[Tensor | None, ...]:
        x_DMK, weight_DNK = ctx.saved_tensors
        grad_x = torch.bmm(grad_DMN, weight_DNK) if ctx.needs_input_grad[0] else None
        add_product(ctx.main_grad.view_as(weight_DNK), grad_DMN.mT, x_DMK)
        grad_bias = grad_DMN.sum(1) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, None
