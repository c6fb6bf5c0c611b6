"""Logits to the gradient of their cross-entropy, in place.

The kernel takes a row through all of its steps while it is in a CPU's cache; under tensor
parallelism all rows step by step, with a small collective between. Its twin is torch's operations.
"""

from megatron_asvr.platforms import kernels

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_asvr.parallel.collectives import all_reduce_max, all_reduce_sum

FIND, EXPONENTIATE, SCALE = 1, 2, 4  # the kernel's steps


def to_gradient(
    logits_MK: Tensor, columns_M: Tensor, tp: ProcessGroup | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [M], whether the target is on top [M], and the gradient of the loss, of ``dtype``.

    Args:
        logits_MK: fp32; they become the gradient too, without rounding.
        columns_M: int64 targets; those outside belong to other ranks.
        tp: group that splits the columns, or None.
        dtype: of the gradient.
    """
    gradient_MK = (
        logits_MK if dtype == logits_MK.dtype else torch.empty_like(logits_MK, dtype=dtype)
    )
    if not (kernels.fit(logits_MK) and kernels.fit(gradient_MK)):
        return (*twin(logits_MK, columns_M, tp), logits_MK.to(dtype))
    top_M, total_M, target_M = logits_MK.new_empty(3, len(logits_MK)).unbind()
    tensors = [gradient_MK, logits_MK, columns_M.contiguous(), top_M, total_M, target_M]
    if tp is None:
        kernels.call("softmax", tensors, *logits_MK.shape, FIND + EXPONENTIATE + SCALE)
    else:
        kernels.call("softmax", tensors, *logits_MK.shape, FIND)
        top_M.copy_(all_reduce_max(top_M, group=tp))
        kernels.call("softmax", tensors, *logits_MK.shape, EXPONENTIATE)
        sums = all_reduce_sum(torch.stack([total_M, target_M]), group=tp)
        total_M.copy_(sums[0])
        target_M.copy_(sums[1])
        kernels.call("softmax", tensors, *logits_MK.shape, SCALE)
    return total_M.log() + (top_M - target_M), target_M >= top_M, gradient_MK


def twin(logits_MK: Tensor, columns_M: Tensor, tp: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The same by torch's own operations; the gradient is in the logits."""
    top_M = all_reduce_max(logits_MK.amax(1), group=tp)
    own_M = (columns_M >= 0) & (columns_M < logits_MK.shape[1])  # the others' are elsewhere
    columns_M1 = columns_M.masked_fill(~own_M, 0)[:, None]
    target_M = logits_MK.gather(1, columns_M1).squeeze(1).masked_fill(~own_M, 0)
    logits_MK.sub_(top_M[:, None]).exp_()
    sums = all_reduce_sum(torch.stack([logits_MK.sum(1), target_M]), group=tp)
    total_M, target_M = sums.unbind()
    logits_MK.div_(total_M[:, None])
    logits_MK.scatter_add_(1, columns_M1, -own_M[:, None].to(logits_MK.dtype))
    return total_M.log() + (top_M - target_M), target_M >= top_M
