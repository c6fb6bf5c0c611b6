"""Numbers beside the losses: how the target codes are used, and whether the two losses agree."""

from collections.abc import Sequence

from megatron_asvr.platforms import mcore, select  # noqa: F401  (mcore prepares the process)

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from megatron_asvr.batch import MicroBatch
from megatron_asvr.model.quantize import perplexity
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.train.step import Part, backward, sum_over_tp


class CodeUsage:
    """How often every code was a target since the last ``values``, for each depth.

    Args:
        codebook_sizes: codes of every depth.
    """

    def __init__(self, codebook_sizes: Sequence[int]) -> None:
        self._sizes = list(codebook_sizes)
        self._counts: list[Tensor] | None = None

    def add(self, parts: Sequence[Part]) -> None:
        """Count the targets of this rank's micro-batches."""
        for part in parts:
            if part.codes_MD is None or not part.codes_MD.numel():
                continue
            new = [
                torch.bincount(codes_M, minlength=size)
                for codes_M, size in zip(part.codes_MD.unbind(1), self._sizes, strict=True)
            ]
            if self._counts is not None:
                new = [a + b for a, b in zip(self._counts, new, strict=True)]
            self._counts = new

    def values(self, *, groups: Groups) -> dict[str, float]:
        """Share of codes in use and perplexity of every depth; counting starts again.

        All ranks take part.

        Args:
            groups: process groups of the layout.
        """
        if not self._sizes:
            return {}
        device = select()[0].device
        empty = [torch.zeros(size, dtype=torch.int64, device=device) for size in self._sizes]
        counts = torch.cat(self._counts or empty)
        self._counts = None
        if groups.plan.dp > 1:
            dist.all_reduce(counts, group=groups.dp)
        values: dict[str, float] = {}
        for depth, count_K in enumerate(counts.cpu().split(self._sizes)):
            values[f"codes_used_{depth}"] = float((count_K > 0).double().mean())
            values[f"code_perplexity_{depth}"] = perplexity(count_K)
        return values


def gradient_cosine(
    model: DistributedDataParallel, batch: MicroBatch, *, groups: Groups
) -> float | None:
    """Cosine of the gradients of the two losses, over the trained parameters that both reach.

    The mean over the data-parallel ranks whose micro-batch has both kinds of targets; None when
    there is none. It costs two forward and backward passes of one micro-batch, and one more copy of
    the gradients. It leaves nothing behind: the next step clears the gradient buffers first.

    Args:
        model: the wrapped model.
        batch: one micro-batch of this rank.
        groups: process groups of the layout.
    """
    params = _reached_by_both(model.module)
    both = batch.num_text_targets > 0 and batch.num_visual_targets > 0 and bool(params)
    both = both and model.module.visual_head is not None
    cosine, number = 0.0, 0  # of this rank's micro-batch
    if both:
        model.zero_grad_buffer()
        backward(model, [batch], lambda sums: sums.text_sum / sums.text_count)
        text = [grad.clone() for grad in _gradients(model.module, params, groups)]
        model.zero_grad_buffer()
        backward(model, [batch], lambda sums: sums.visual_sum_D.sum() / sums.visual_count)
        visual = _gradients(model.module, params, groups)
        cosine, number = _cosine(params, text, visual, groups), 1
    summary = torch.tensor([cosine, number], dtype=torch.float64, device=select()[0].device)
    if groups.plan.dp > 1:
        dist.all_reduce(summary, group=groups.dp)
    total, number = summary.tolist()
    return total / number if number else None


def _reached_by_both(model: nn.Module) -> list[nn.Parameter]:
    """Trained parameters on the way to both losses: all but the two heads."""
    return [
        param
        for name, param in model.named_parameters()
        if param.requires_grad
        and not name.startswith("visual_head.")
        and name != "language_model.output_layer.weight"
    ]


def _gradients(model: nn.Module, params: Sequence[nn.Parameter], groups: Groups) -> list[Tensor]:
    """This rank's gradients, complete for its samples."""
    partial = {id(p) for p in model.partial_grad_parameters()}
    if model.config.sequence_parallel:
        partial |= {id(p) for p in params if getattr(p, "sequence_parallel", False)}
    if model.config.qk_layernorm:  # each rank normalises its own heads with the same weight
        names = ("q_layernorm", "k_layernorm")
        partial |= {id(p) for n, p in model.named_parameters() if any(part in n for part in names)}
    sum_over_tp([p.main_grad for p in params if id(p) in partial], groups=groups)
    return [p.main_grad for p in params]


def _cosine(
    params: Sequence[nn.Parameter], a: Sequence[Tensor], b: Sequence[Tensor], groups: Groups
) -> float:
    products = torch.zeros(3, dtype=torch.float64, device=a[0].device)
    for param, x, y in zip(params, a, b, strict=True):
        # Every rank adds its share: of a replicated parameter an equal part of the whole.
        sharded = getattr(param, "tensor_model_parallel", False)
        weight = 1.0 if sharded else 1.0 / groups.plan.tp
        pairs = torch.stack([(x * y).sum(), (x * x).sum(), (y * y).sum()])
        products += weight * pairs.double()
    if groups.plan.tp > 1:
        dist.all_reduce(products, group=groups.tp)
    dot, first, second = products.tolist()
    return dot / max((first * second) ** 0.5, 1e-30)
