"""Every collective of ours, with a gradient or without: nothing else calls torch.distributed's.

On the CPU gloo forgives what NCCL hangs on or corrupts: CPU tensors in a GPU group, strided memory,
ranks that bring different sizes. So one function, ``_check``, stands before every collective of
tensors and refuses on the CPU what would fail on the GPU. That ranks agree on what they do, and on
sizes, can only be seen by asking them: ``checked_sizes()`` or ``ASVR_CHECK_COLLECTIVES=1`` does so
before each collective. Object collectives pickle: torch moves the bytes through a tensor on the
device of the group's backend.

The differentiable functions are named by what the forward pass does. The two for tensor parallelism
are each other's mirror: ``copy_to_tp`` sums gradients, ``reduce_from_tp`` sums values.

A group of None is this rank alone.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_asvr.errors import AsvrError

_DEVICE = {"gloo": "cpu", "nccl": "cuda"}  # gloo would take CUDA tensors too, through the host
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES = (*_FLOATS, torch.int64, torch.int32, torch.int8, torch.uint8)  # gloo's and NCCL's
_compares = False


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


def all_reduce_sum(x: Tensor, *, group: ProcessGroup | None) -> Tensor:
    """The sum of ``x`` over the group, in a new tensor without a gradient (counts, statistics)."""
    return _all_reduce(x.detach(), dist.ReduceOp.SUM, group)


def all_reduce_max(x: Tensor, *, group: ProcessGroup | None) -> Tensor:
    """The largest ``x`` of the group, elementwise, in a new tensor without a gradient."""
    return _all_reduce(x.detach(), dist.ReduceOp.MAX, group)


def sum_in_place(tensors: Sequence[Tensor], *, group: ProcessGroup | None) -> None:
    """Sum each tensor over the group in place, all of them in one collective.

    Args:
        tensors: of one dtype, any shapes and strides; as many and as large on every rank.
        group: the ranks that hold the summands.

    Raises:
        AsvrError: the tensors have several dtypes.
    """
    if _alone(group) or not tensors:
        return
    if len(dtypes := {x.dtype for x in tensors}) > 1:
        raise AsvrError(f"sum_in_place: tensors of {sorted(map(str, dtypes))}; give one dtype")
    flat = torch.cat([x.detach().flatten() for x in tensors])
    _check("all_reduce SUM", flat, group)
    dist.all_reduce(flat, group=group)
    with torch.no_grad():
        for x, summed in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(summed.view_as(x))


def gather_equal(x: Tensor, *, group: ProcessGroup | None) -> list[Tensor]:
    """``x`` of every rank of the group, in rank order, without a gradient; one shape on all."""
    x = x.detach()
    return [x] if _alone(group) else list(_all_gather(x, group).unbind())


def broadcast_tensor(x: Tensor | None, src: int = 0, *, group: ProcessGroup | None) -> Tensor:
    """``x`` of rank ``src`` of the group, on the device of the group's backend.

    Args:
        x: any shape and dtype on the source; not read elsewhere (shape and dtype are sent too).
        src: rank in the group, not in the world.
        group: the ranks that want it.
    """
    if _alone(group):
        return x
    is_source = group.rank() == src
    shape, dtype = broadcast_object((x.shape, x.dtype) if is_source else None, src, group=group)
    if is_source:
        y = x.detach().contiguous()
    else:
        y = torch.empty(shape, dtype=dtype, device=_DEVICE.get(dist.get_backend(group)))
    _check("broadcast", y, group)
    dist.broadcast(y, group_src=src, group=group)
    return y


def gather_objects(value: Any, *, group: ProcessGroup | None) -> list[Any]:
    """``value`` of every rank of the group, in rank order; anything that can be pickled."""
    if _alone(group):
        return [value]
    _compare("gather_objects", group=group)
    return _gather_objects(value, group)


def broadcast_object(value: Any, src: int = 0, *, group: ProcessGroup | None) -> Any:
    """``value`` of rank ``src`` of the group; the other ranks' values are not read."""
    if _alone(group):
        return value
    _compare("broadcast_object", src, group=group)
    values = [value]
    dist.broadcast_object_list(values, group_src=src, group=group)
    return values[0]


def on_first(fn: Callable[[], Any], *, group: ProcessGroup | None) -> Any:
    """What ``fn`` returns on the group's first rank, or the error of ours it raises, on every rank.

    Args:
        fn: called on the first rank only.
        group: the ranks that take part; None: this process alone.
    """
    value = None
    if group is None or group.rank() == 0:
        try:
            value = fn()
        except AsvrError as err:
            value = err
    value = broadcast_object(value, group=group)
    if isinstance(value, AsvrError):
        raise value
    return value


def device_of(group: ProcessGroup) -> str:
    """Where the group's backend wants its tensors."""
    return _DEVICE.get(dist.get_backend(group), "cpu")


def barrier(*, group: ProcessGroup | None) -> None:
    """Return when every rank of the group has come here."""
    if not _alone(group):
        _compare("barrier", group=group)
        dist.barrier(group=group)


@contextlib.contextmanager
def checked_sizes() -> Iterator[None]:
    """Inside, ranks compare what they are about to do before each collective.

    It costs a second collective each time. All ranks must be inside at the same time.

    Raises:
        AsvrError: on every rank of the group, naming those that differ from its first.
    """
    global _compares
    before, _compares = _compares, True
    try:
        yield
    finally:
        _compares = before


def _alone(group: ProcessGroup | None) -> bool:
    return group is None or group.size() == 1


def _check(what: str, x: Tensor, group: ProcessGroup) -> None:
    """Refuse what the group's backend cannot send, or what NCCL could not."""
    backend = dist.get_backend(group)
    wanted = _DEVICE.get(backend, x.device.type)
    form = f"{what} of {tuple(x.shape)} {x.dtype} on {x.device} over {group.size()} ranks"
    if x.device.type != wanted:
        raise AsvrError(f"{form}: {backend} wants tensors on {wanted}; move it there before")
    if x.dtype not in _DTYPES:
        raise AsvrError(f"{form}: no dtype that both gloo and NCCL send; convert it before")
    if not x.is_contiguous():
        raise AsvrError(f"{form}: its memory is strided {x.stride()}; call contiguous() before")
    _compare(what, tuple(x.shape), x.dtype, group=group)


def _compare(*mine: object, group: ProcessGroup) -> None:
    """Raise on all ranks of the group unless all bring the same, where that is to be checked."""
    if not (_compares or os.environ.get("ASVR_CHECK_COLLECTIVES") == "1"):
        return
    forms = _gather_objects(mine, group)
    ranks = dist.get_process_group_ranks(group)
    wrong = [f"rank {r}: {form}" for r, form in zip(ranks, forms, strict=True) if form != forms[0]]
    if wrong:
        raise AsvrError(
            f"ranks {ranks} disagree on a collective: {'; '.join(wrong)}; rank {ranks[0]} brings "
            f"{forms[0]}. All must bring the same"
        )


def _gather_objects(value: Any, group: ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def _all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType, group: ProcessGroup | None) -> Tensor:
    """Reduced copy of ``x``."""
    y = x.clone(memory_format=torch.contiguous_format)
    if not _alone(group):
        _check(f"all_reduce {op.name}", y, group)
        dist.all_reduce(y, op=op, group=group)
    return y


def _all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """``x`` of all ranks: [ranks, ...]."""
    x = x.contiguous()
    _check("all_gather", x, group)
    gathered = x.new_empty(group.size() * x.numel())
    dist.all_gather_into_tensor(gathered, x.flatten(), group=group)
    return gathered.view(group.size(), *x.shape)


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
        shares = _all_gather(padded, group)
        return torch.cat([share[:n] for share, n in zip(shares, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_reduce(grad, dist.ReduceOp.SUM, ctx.sum_over)[ctx.rows], None, None, None


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        mine = grad.new_empty(len(grad) // ctx.group.size(), *grad.shape[1:])
        _check("reduce_scatter", grad, ctx.group)
        dist.reduce_scatter_tensor(mine, grad, group=ctx.group)
        return mine, None
