"""Cross-entropies over a vocabulary that is split over ranks, and the joint objective.

A loss is a sum and a count. The forward pass returns both; the division by the exact count of
the whole global batch happens once, in ``joint_loss``. ``official_loss`` is the arithmetic of the
official code instead: means of one micro-batch, and a literal 8 for the number of depths.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_asvr.parallel.collectives import all_reduce_max, all_reduce_sum

OFFICIAL_DEPTHS = 8  # what the official code divides by, whatever its number of depths


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSums:
    """Sums and counts of one micro-batch, the same on every rank of its tensor-parallel group.

    Attributes:
        text_sum: fp32 scalar with gradient, cross-entropy summed over the text targets.
        text_count: number of text targets.
        text_correct: int64 scalar, text targets with the highest logit (ties count).
        visual_sum_D: fp32 [D] with gradient, for each depth the sum over the visual targets that
            were drawn; [0] in a model without a visual head.
        visual_count: number of positions with a visual target, drawn or not.
        visual_correct_D: int64 [D], codes with the highest logit (ties count).
        codes_MD: int64 target codes, for the usage statistics; None without a visual head.
        visual_scale: makes of sums and counts over the drawn targets those over all.
    """

    text_sum: Tensor
    text_count: int
    text_correct: Tensor
    visual_sum_D: Tensor
    visual_count: int
    visual_correct_D: Tensor
    codes_MD: Tensor | None
    visual_scale: float = 1.0

    def totals(self) -> Tensor:
        """All sums and counts as one detached fp64 vector [4 + 2 D], to be added up over ranks.

        Order: text sum, text count, text correct, visual count, visual sums, visual corrects.
        """
        counts = torch.tensor([self.text_count, self.visual_count], device=self.text_sum.device)
        parts = [self.text_sum[None], counts[:1], self.text_correct[None], counts[1:]]
        drawn = torch.cat([self.visual_sum_D.detach().double(), self.visual_correct_D.double()])
        return torch.cat([*(part.detach().double() for part in parts), self.visual_scale * drawn])


class Scales(NamedTuple):
    """Gradients of a loss with respect to the sums of a micro-batch.

    Attributes:
        text: of ``LossSums.text_sum``.
        visual_D: of ``LossSums.visual_sum_D``.
    """

    text: float
    visual_D: list[float]


def scales_of(
    loss: Callable[[LossSums], Tensor],
    *,
    text_count: int,
    visual_count: int,
    visual_scale: float,
    depth: int,
) -> Scales:
    """The gradients of a loss that is linear in the sums, before these are known.

    Args:
        loss: from sums to a scalar.
        text_count: text targets of the micro-batch.
        visual_count: positions of the micro-batch with a visual target.
        visual_scale: of the micro-batch.
        depth: number of depths.
    """
    with torch.enable_grad():
        text_sum = torch.ones((), requires_grad=True)
        visual_sum_D = torch.ones(depth, requires_grad=True)
        value = loss(
            LossSums(
                text_sum=text_sum,
                text_count=text_count,
                text_correct=torch.tensor(0),
                visual_sum_D=visual_sum_D,
                visual_count=visual_count,
                visual_correct_D=torch.zeros(depth, dtype=torch.int64),
                codes_MD=None,
                visual_scale=visual_scale,
            )
        )
        text, visual_D = torch.autograd.grad(
            value, (text_sum, visual_sum_D), materialize_grads=True
        )
    return Scales(float(text), visual_D.tolist())


def read_totals(totals: Tensor) -> dict[str, float]:
    """Mean losses and accuracies from a (summed) vector of ``LossSums.totals``.

    Keys: ``text_loss``, ``text_accuracy``, ``text_targets``, and with a visual head
    ``visual_loss``, ``visual_targets``, ``visual_loss_d`` and ``visual_accuracy_d`` for every
    depth d. A loss without targets is 0.
    """
    text_sum, text_count, text_correct, visual_count, *rest = totals.tolist()
    per_text, per_visual = 1 / max(text_count, 1), 1 / max(visual_count, 1)
    values = {
        "text_loss": text_sum * per_text,
        "text_accuracy": text_correct * per_text,
        "text_targets": text_count,
    }
    depth = len(rest) // 2
    if depth:
        values["visual_loss"] = sum(rest[:depth]) * per_visual / depth
        values["visual_targets"] = visual_count
    for d in range(depth):
        values[f"visual_loss_{d}"] = rest[d] * per_visual
        values[f"visual_accuracy_{d}"] = rest[depth + d] * per_visual
    return values


def cross_entropy(
    logits: Sequence[Tensor], targets_MD: Tensor, *, tp: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy [D, M] with gradient, and whether the target has the highest logit [D, M].

    All depths share two collectives forward and need none backward.

    Args:
        logits: for each depth fp32 [M, K_d / tp]: this rank's part of the vocabulary, the parts
            in rank order and of one length.
        targets_MD: int64 targets, global indices.
        tp: group that splits the vocabularies, or None.
    """
    return _CrossEntropy.apply(targets_MD, tp, *logits)


def summed_cross_entropy(
    logits: Sequence[Tensor], targets_MD: Tensor, *, tp: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """``cross_entropy`` summed over positions: fp32 [D] with gradient, and int64 [D].

    For output layers whose product is emulated in 8 bits; for all others see ``output_loss``, which
    holds no logits. The arguments are those of ``cross_entropy``.
    """
    loss_DM, top_DM = cross_entropy(logits, targets_MD, tp=tp)
    return loss_DM.sum(1), top_DM.sum(1)


def joint_loss(
    sums: LossSums, *, global_text_count: int, global_visual_count: int, visual_weight: float
) -> Tensor:
    """This micro-batch's part of the global loss: the parts of all micro-batches add up to it.

    L = text / N_text + w * (sum over depths of visual_d / N_visual) / D; a loss without any
    target in the global batch is 0, with zero gradients.

    Args:
        sums: of one micro-batch.
        global_text_count: text targets of the whole global batch.
        global_visual_count: positions with a visual target, in the whole global batch.
        visual_weight: w.

    Source: arXiv 2506.09040, equation 4, with exact global counts.
    """
    loss = sums.text_sum / max(global_text_count, 1)
    depth = sums.visual_sum_D.numel()
    if depth:
        scale = sums.visual_scale * visual_weight / (depth * max(global_visual_count, 1))
        loss = loss + scale * sums.visual_sum_D.sum()
    return loss


def official_loss(sums: LossSums, *, visual_weight: float) -> Tensor:
    """The loss of one micro-batch as the official code computes it.

    Means over the micro-batch; the visual one is summed over depths and divided by a literal 8.
    NaN when the micro-batch has no text target, as there.

    Args:
        sums: of one micro-batch.
        visual_weight: weight of the visual loss (1 in the official code).
    """
    text = sums.text_sum / sums.text_count if sums.text_count else sums.text_sum * float("nan")
    visual = sums.visual_sum_D.sum() / (OFFICIAL_DEPTHS * max(sums.visual_count, 1))
    return text + visual_weight * visual


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, targets_MD: Tensor, tp: ProcessGroup | None, *logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        top_DM = torch.stack([part.amax(1) for part in logits])
        if tp is not None:
            top_DM = all_reduce_max(top_DM, group=tp)
        exps, columns, sums = [], [], []
        for depth, part in enumerate(logits):
            exp_MK = torch.exp(part - top_DM[depth][:, None])
            column_M, own_M = _own_targets(targets_MD[:, depth], part.shape[1], tp)
            target_M = part.gather(1, column_M[:, None]).squeeze(1)
            if own_M is not None:
                target_M = target_M.masked_fill(~own_M, 0)
            exps.append(exp_MK)
            columns += [column_M] if own_M is None else [column_M, own_M]
            sums += [exp_MK.sum(1), target_M]
        sums_DCM = torch.stack(sums).unflatten(0, (len(logits), 2))
        if tp is not None:
            sums_DCM = all_reduce_sum(sums_DCM, group=tp)
        total_DM, target_DM = sums_DCM.unbind(1)
        ctx.depth = len(logits)
        ctx.save_for_backward(total_DM, *exps, *columns)
        correct_DM = target_DM >= top_DM
        ctx.mark_non_differentiable(correct_DM)
        return total_DM.log() + top_DM - target_DM, correct_DM

    @staticmethod
    def backward(ctx: Any, grad_DM: Tensor, _: None) -> tuple[Tensor | None, ...]:
        total_DM, *saved = ctx.saved_tensors
        exps, columns = saved[: ctx.depth], saved[ctx.depth :]
        step = len(columns) // ctx.depth
        scale_DM = grad_DM / total_DM
        grads = []
        for depth, exp_MK in enumerate(exps):
            at_target_M = -grad_DM[depth]
            if step == 2:  # a target on another rank changes nothing here
                at_target_M = at_target_M.masked_fill(~columns[2 * depth + 1], 0)
            grad_MK = exp_MK * scale_DM[depth][:, None]
            grad_MK.scatter_add_(1, columns[step * depth][:, None], at_target_M[:, None])
            grads.append(grad_MK)
        return None, None, *grads


def _own_targets(
    targets_M: Tensor, size: int, tp: ProcessGroup | None
) -> tuple[Tensor, Tensor | None]:
    """This rank's column of each target (any column if it is not here), and whether it is here."""
    if tp is None:
        return targets_M, None
    column_M = targets_M - tp.rank() * size
    own_M = (column_M >= 0) & (column_M < size)
    return column_M.masked_fill(~own_M, 0), own_M
