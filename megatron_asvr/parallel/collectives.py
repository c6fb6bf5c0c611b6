"""Collectives with a gradient.

Each is named by what the forward pass does. The two for tensor parallelism are each other's mirror:
``copy_to_tp`` sums gradients, ``reduce_from_tp`` sums values.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_asvr.errors import AsvrError


def copy_to_tp(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """``x`` itself; its gradient is summed over the group.

    Put it where a replicated tensor enters a computation that is split over the group.

    Args:
        x: any shape, the same on every rank of the group.
        group: the ranks that split the computation.
    """
    return _SumGradient.apply(x, group) if group.size() > 1 else x


def reduce_from_tp(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """The sum of ``x`` over the group, in a new tensor; the gradient passes unchanged.

    Put it where partial results of a split computation become one replicated tensor.

    Args:
        x: any shape, one summand per rank.
        group: the ranks that hold the summands.
    """
    return _SumValue.apply(x, group) if group.size() > 1 else x


def gather_images(
    x: Tensor, *, sizes: Sequence[int], group: ProcessGroup, sum_over: ProcessGroup
) -> Tensor:
    """The rows of all ranks of the group, in rank order; the gradient is this rank's own rows.

    Ranks of the group that are not in ``sum_over`` must have the same full gradient of the result
    (as behind ``copy_to_tp``). Ranks of ``sum_over`` use the result for different positions: their
    gradients are summed.

    Args:
        x: [rows of this rank, ...]; ranks may hold different numbers of rows, also none.
        sizes: rows of each rank of the group, the same list on every rank.
        group: the ranks that share the rows.
        sum_over: a part of the group, with this rank: those with partial gradients.

    Raises:
        AsvrError: ``sizes`` does not fit the group or this rank's rows.
    """
    rank = group.rank()
    if len(sizes) != group.size() or sizes[rank] != x.shape[0]:
        raise AsvrError(
            f"gather_images: sizes={list(sizes)} for a group of {group.size()}, and rank {rank} "
            f"brings {x.shape[0]} rows"
        )
    # Without any row there is nothing to send, and gloo refuses to send nothing.
    if group.size() == 1 or not any(sizes):
        return x
    return _GatherRows.apply(x, tuple(sizes), group, sum_over)


def gather_columns(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """The first dimension of all ranks of the group, in rank order; gradients are summed.

    Every rank uses the result in its own way, so the gradient of a rank's rows is the sum over the
    ranks of what they give for these rows.

    Args:
        x: [rows, ...], as many on every rank.
        group: the ranks that share the rows.
    """
    return _GatherColumns.apply(x, group) if group.size() > 1 else x


def all_reduce_sum(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """The sum of ``x`` over the group, in a new tensor without a gradient (counts, statistics)."""
    return _all_reduce(x.detach(), dist.ReduceOp.SUM, group)


def all_reduce_max(x: Tensor, *, group: ProcessGroup) -> Tensor:
    """The largest ``x`` of the group, elementwise, in a new tensor without a gradient."""
    return _all_reduce(x.detach(), dist.ReduceOp.MAX, group)


def _all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType, group: ProcessGroup) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    if group.size() > 1:
        dist.all_reduce(y, op=op, group=group)
    return y


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, dist.ReduceOp.SUM, ctx.group), None


class _SumValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return _all_reduce(x, dist.ReduceOp.SUM, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sizes: tuple[int, ...], group: ProcessGroup, sum_over: ProcessGroup
    ) -> Tensor:
        rank, most = group.rank(), max(sizes)
        ctx.sum_over = sum_over
        ctx.rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        # gloo and NCCL gather equal shapes only: shares are padded to the largest.
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: sizes[rank]] = x
        shares = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(shares, padded, group=group)
        return torch.cat([share[:n] for share, n in zip(shares, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_reduce(grad, dist.ReduceOp.SUM, ctx.sum_over)[ctx.rows], None, None, None


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        full = _all_reduce(grad, dist.ReduceOp.SUM, ctx.group)
        return full.chunk(ctx.group.size())[ctx.group.rank()], None
