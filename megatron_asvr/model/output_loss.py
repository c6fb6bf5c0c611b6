"""Output layers and their cross-entropy in one: the logits never exist as a whole.

An output layer gives ``logits = x W^T + b`` over a vocabulary of which this rank holds some rows.
The loss of all positions is computed chunk by chunk in the forward pass, and so are the gradients:
once the softmax of a chunk is there, those of ``x``, ``W`` and ``b`` are two products away, and the
chunk's memory is used again. The backward pass only multiplies them by the gradient of the loss,
which is exact because the loss of a depth is returned as one sum. To compute them in the backward
pass instead, the logits would be needed a second time (docs/performance.md has the cost of both).

Where that gradient is known before (``scales``), those of parameters with a gradient buffer are
added there at once: ``main_grad``, which megatron-core's DistributedDataParallel gives them. The
backward pass then brings no gradient for them, and none waits for it.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_asvr.errors import AsvrError
from megatron_asvr.precision.matmul import add_product
from megatron_asvr.precision.softmax import to_gradient

CHUNK_BYTES = 2**26  # of fp32 logits that exist at a time
UNSEEN = -1e30  # the highest logit of a rank that holds no word of a vocabulary


class OutputLayer(NamedTuple):
    """The output layer of one depth, over this rank's part of a vocabulary.

    Attributes:
        weight: [rows, E], as many rows on every rank; rows beyond the vocabulary are padding.
        bias: [rows], or None.
        first: index of the first row in the vocabulary.
        size: words of the whole vocabulary.
    """

    weight: Tensor
    bias: Tensor | None
    first: int
    size: int


class _Total(NamedTuple):
    """Where gradients of a parameter are added, fp32, and what they are multiplied by before."""

    sum: Tensor
    scale: float = 1.0


def output_loss(
    x_DME: Tensor,
    layers: Sequence[OutputLayer],
    targets_MD: Tensor,
    *,
    tp: ProcessGroup | None,
    scales: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over positions, fp32 [D] with gradient, and targets on top, int64 [D].

    A target is on top when no logit is higher (ties count). A chunk takes two small collectives;
    the gradient of ``x_DME`` is this rank's part of it (see ``collectives.copy_to_tp``).

    Args:
        x_DME: the layers' input, the same on every rank; M may be 0.
        layers: one for each depth; vocabularies may differ in size.
        targets_MD: int64 targets, indices of the whole vocabulary.
        tp: group that splits the vocabularies, or None.
        scales: the gradient that each depth's sum will get, where it is known: a backward pass must
            follow, and gradients of parameters with a ``main_grad`` are added to it now.

    Raises:
        AsvrError: by the backward pass, when it brings another gradient than ``scales``.
    """
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    with_grad = torch.is_grad_enabled()
    return _OutputLoss.apply(x_DME, targets_MD, layers, tp, with_grad, scales, *parameters)


def check_scales(grad_D: Tensor, scales: Sequence[float]) -> None:
    """Refuse a gradient of the loss that is not the one that was used in the forward pass.

    Args:
        grad_D: what the backward pass brings for each depth's sum.
        scales: what was used; NaN agrees with NaN.

    Raises:
        AsvrError: they differ.
    """
    used_D = grad_D.new_tensor(scales)
    if not torch.allclose(grad_D, used_D, rtol=1e-6, atol=0.0, equal_nan=True):
        raise AsvrError(
            "gradients of output layers were computed for sums whose gradients are "
            f"{list(scales)}, but the backward pass brings {grad_D.tolist()}; a loss must be "
            "linear in its sums"
        )


def chunks(positions: int, layer: OutputLayer) -> list[slice]:
    """Nearly equal parts of the positions, whose fp32 logits take at most ``CHUNK_BYTES``.

    Args:
        positions: to be cut; there may be none.
        layer: gives the rows of this rank.
    """
    number = min(positions, -(-positions * len(layer.weight) * 4 // CHUNK_BYTES))
    ends = [positions * n // number for n in range(number + 1)] if number else []
    return [slice(start, end) for start, end in pairwise(ends)]


class _OutputLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_DME: Tensor,
        targets_MD: Tensor,
        layers: Sequence[OutputLayer],
        tp: ProcessGroup | None,
        with_grad: bool,
        scales: Sequence[float] | None,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        needs = [with_grad and need for need in ctx.needs_input_grad]
        grad_x = torch.zeros_like(x_DME, dtype=torch.float32) if needs[0] else None
        totals: list[_Total | None] = []
        grads: list[Tensor | None] = []  # those that wait for the backward pass
        for place, (p, need) in enumerate(zip(parameters, needs[6:], strict=True)):
            if need and scales is not None and hasattr(p, "main_grad"):
                grads.append(None)
                totals.append(_Total(p.main_grad, scales[place // 2]))
            else:
                grads.append(torch.zeros_like(p, dtype=torch.float32) if need else None)
                totals.append(_Total(grads[-1]) if need else None)
        sizes = [
            (rows.stop - rows.start) * len(layer.weight)
            for layer in layers
            for rows in chunks(x_DME.shape[1], layer)
        ]
        memory = x_DME.new_empty(max(sizes, default=0), dtype=torch.float32)
        results = []
        for d, layer in enumerate(layers):
            into = (None if grad_x is None else grad_x[d], *totals[2 * d : 2 * d + 2])
            results.append(_one_depth(x_DME[d], layer, targets_MD[:, d], tp, memory, into))
        sum_D, top_D = (torch.stack(values) for values in zip(*results, strict=True))
        ctx.save_for_backward(grad_x, *grads)
        ctx.scales, ctx.dtype = scales, x_DME.dtype
        ctx.dtypes = [None if p is None else p.dtype for p in parameters]
        ctx.mark_non_differentiable(top_D)
        return sum_D, top_D

    @staticmethod
    def backward(ctx: Any, grad_D: Tensor, _: None) -> tuple[Tensor | None, ...]:
        grad_x, *grads = ctx.saved_tensors
        if grad_x is not None:
            if not grad_x.shape[1]:  # no position: no gradient, whatever became of the loss
                grad_D = torch.zeros_like(grad_D)
            elif ctx.scales is not None:
                check_scales(grad_D, ctx.scales)
            grad_x = grad_x.mul_(grad_D[:, None, None]).to(ctx.dtype)
        # In place: they are as large as the weights. torch refuses a second backward pass.
        scaled = [
            None if grad is None else grad.mul_(grad_D[place // 2]).to(ctx.dtypes[place])
            for place, grad in enumerate(grads)
        ]
        return grad_x, None, None, None, None, None, *scaled


def _one_depth(
    x_ME: Tensor,
    layer: OutputLayer,
    targets_M: Tensor,
    tp: ProcessGroup | None,
    memory: Tensor,
    grads: tuple[Tensor | None, _Total | None, _Total | None],
) -> tuple[Tensor, Tensor]:
    """Summed loss and targets on top of one depth; gradients are added to ``grads`` (x, W, b)."""
    # A rank without any word keeps one row of padding, which nothing can reach.
    words = max(1, min(layer.size - layer.first, layer.weight.shape[0]))
    weight_KE = layer.weight[:words]
    bias_K = None if layer.bias is None else layer.bias[:words]
    grad_ME, total_KE, total_K = grads
    sum_ = x_ME.new_zeros((), dtype=torch.float32)
    num_top = torch.zeros_like(sum_, dtype=torch.int64)
    for rows in chunks(len(x_ME), layer):
        part_ME = x_ME[rows]
        logits_MK = memory[: len(part_ME) * words].view(-1, words)
        if bias_K is not None:
            logits_MK.copy_(bias_K)
        add_product(logits_MK, part_ME, weight_KE.T, keep=float(bias_K is not None))
        if layer.first >= layer.size:
            logits_MK.fill_(UNSEEN)
        columns_M = targets_M[rows] - layer.first
        loss_M, is_top_M, gradient_MK = to_gradient(logits_MK, columns_M, tp, x_ME.dtype)
        sum_ += loss_M.sum()
        num_top += is_top_M.sum()
        if total_K is not None:
            summed_K = logits_MK.T @ logits_MK.new_ones(len(logits_MK))
            total_K.sum[:words].add_(summed_K, alpha=total_K.scale)
        if grad_ME is not None:
            add_product(grad_ME[rows], gradient_MK, weight_KE, keep=0.0)
        if total_KE is not None:
            add_product(total_KE.sum[:words], gradient_MK.T, part_ME, scale=total_KE.scale)
    return sum_, num_top
