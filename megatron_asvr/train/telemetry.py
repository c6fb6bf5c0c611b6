"""Numbers beside the losses: how the target codes are used, and whether the two losses agree."""

from collections.abc import Sequence

from megatron_asvr.platforms import mcore, select  # noqa: F401  (mcore prepares the process)

import torch
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from megatron_asvr.batch import MicroBatch
from megatron_asvr.model.quantize import perplexity
from megatron_asvr.model.sharding import is_expert, is_split, named
from megatron_asvr.parallel.collectives import all_reduce_sum
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.train.passes import Chunks, LossFunction, Part, backward
from megatron_asvr.train.step import Agreement, contributes, reduce_gradients


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
        counts = torch.zeros(sum(self._sizes), dtype=torch.int64, device=select()[0].device)
        if self._counts is not None and contributes(groups):
            counts = torch.cat(self._counts)
        self._counts = None
        counts = all_reduce_sum(counts, group=groups.world)
        values: dict[str, float] = {}
        for depth, count_K in enumerate(counts.cpu().split(self._sizes)):
            values[f"codes_used_{depth}"] = float((count_K > 0).double().mean())
            values[f"code_perplexity_{depth}"] = perplexity(count_K)
        return values


def gradient_cosine(
    chunks: Chunks, batches: Sequence[MicroBatch], agreement: Agreement, *, groups: Groups
) -> float | None:
    """Cosine of the gradients of the two losses of a step, over what lies on the way to both.

    None when the global batch lacks one kind of targets, or nothing trained is reached by both. It
    costs two more forward and backward passes of the step and one more copy of the gradients. It
    leaves nothing behind: the next step clears the gradient buffers first.

    Args:
        chunks: the wrapped model.
        batches: this rank's micro-batches of the step.
        agreement: counts of the step's global batch: all ranks decide alike.
        groups: process groups of the layout.
    """
    text_count, visual_count = agreement.text_count, agreement.visual_count
    if not (text_count and visual_count and chunks[0].module.num_depths):
        return None
    params = _reached_by_both([chunk.module for chunk in chunks])

    def gradients(loss: LossFunction) -> list[Tensor]:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        backward(chunks, batches, loss)
        reduce_gradients(chunks, groups=groups, whole=True)
        return [param.main_grad for param in params]

    text = [x.clone() for x in gradients(lambda sums: sums.text_sum / text_count)]
    visual = gradients(lambda sums: sums.visual_sum_D.sum() / visual_count)
    products = torch.zeros(3, dtype=torch.float64, device=select()[0].device)
    for param, x, y in zip(params, text, visual, strict=True):
        pairs = torch.stack([(x * y).sum(), (x * x).sum(), (y * y).sum()])
        products += pairs.double() / _copies(param, groups)
    dot, first, second = all_reduce_sum(products, group=groups.world).tolist()
    return dot / (first * second) ** 0.5 if first and second else None


def _reached_by_both(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Trained parameters on the way to both losses: all but the two heads."""
    return [
        param
        for name, param in named(modules)
        if param.requires_grad
        and param_is_not_shared(param)  # a tied embedding counts on the first stage
        and not name.startswith("visual_head.")
        and name != "language_model.output_layer.weight"
    ]


def _copies(param: nn.Parameter, groups: Groups) -> int:
    """Ranks that hold the same part of a parameter."""
    if is_expert(param):
        return groups.expert_dp.size()
    return groups.dp_cp.size() * (1 if is_split(param) else groups.plan.tp)
