"""Causal attention over the depths of every position, alone: the visual head's.

A position has few depths, so its queries, keys and values fit a CPU's nearest cache together. The
kernel (``platforms/kernels.cpp``) reads them as the product before wrote them, keeps nothing, and
computes probabilities again in the backward pass. Its twin is torch's attention, which wants them
in another order.
"""

from typing import Any

from megatron_asvr.platforms import kernels

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron_asvr.precision.remake import remember


def attend_depths(packed_DMF: Tensor, num_heads: int) -> Tensor:
    """What every depth takes from itself and those before it: [D, M, heads x head width].

    Args:
        packed_DMF: queries, keys and values: [D, M, 3 x heads x head width].
        num_heads: of this rank.
    """
    if not kernels.fit(packed_DMF):
        return twin(packed_DMF, num_heads)
    packed_DMF = packed_DMF.contiguous()
    kept = packed_DMF.detach()
    return remember(_Attend.apply(packed_DMF, num_heads), lambda: _attend(kept, num_heads))


def twin(packed_DMF: Tensor, num_heads: int) -> Tensor:
    """The same by torch's own operations."""
    # [D, M, 3, heads, head width] -> three of [M, heads, D, head width]
    split = packed_DMF.unflatten(-1, (3, num_heads, -1)).permute(2, 1, 3, 0, 4)
    attended = F.scaled_dot_product_attention(*split.unbind(0), is_causal=True)
    return attended.permute(2, 0, 1, 3).flatten(2)


def _attend(packed_DMF: Tensor, num_heads: int) -> Tensor:
    depth, positions, features = packed_DMF.shape
    out_DME = packed_DMF.new_empty(depth, positions, features // 3)
    width = features // 3 // num_heads
    kernels.call("attend", [packed_DMF, out_DME], depth, positions, num_heads, width)
    return out_DME


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed_DMF: Tensor, num_heads: int) -> Tensor:
        ctx.save_for_backward(packed_DMF)
        ctx.num_heads = num_heads
        return _attend(packed_DMF, num_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_DME: Tensor) -> tuple[Tensor | None, ...]:
        (packed_DMF,) = ctx.saved_tensors
        (depth, positions, features), heads = packed_DMF.shape, ctx.num_heads
        grad_DMF = torch.empty_like(packed_DMF)
        tensors = [packed_DMF, grad_DME.contiguous(), grad_DMF]
        kernels.call("attend_backward", tensors, depth, positions, heads, features // 3 // heads)
        return grad_DMF, None
