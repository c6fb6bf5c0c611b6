"""Losses on held-out data, teacher-forced."""

from collections.abc import Sequence

import torch

from megatron_asvr.config.schema import LossConfig
from megatron_asvr.data.loader import Loader
from megatron_asvr.model.asvr import AsvrModel
from megatron_asvr.model.loss import LossSums, read_totals
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.train.passes import run_schedule
from megatron_asvr.train.step import sum_parts


@torch.no_grad()
def validate(
    chunks: Sequence[AsvrModel], loader: Loader, loss: LossConfig, *, groups: Groups
) -> dict[str, float]:
    """Losses and accuracies over the whole split, per target; the same on every rank.

    Args:
        chunks: the bare model.
        loader: of the split; every sample is met once.
        loss: the weight of the visual loss in ``loss``.
        groups: process groups of the layout.
    """
    for chunk in chunks:
        chunk.eval()
    depth = chunks[0].num_depths
    totals = torch.zeros(4 + 2 * depth, dtype=torch.float64)
    for step in range(loader.steps):
        parts = run_schedule(chunks, loader.step(step), _text_sum, forward_only=True)
        totals += sum_parts(parts, depth=depth, groups=groups)[0]
    for chunk in chunks:
        chunk.train()
    values = read_totals(totals)
    joint = values["text_loss"] + loss.visual_weight * values.get("visual_loss", 0.0)
    return {"loss": joint, **values}


def _text_sum(sums: LossSums) -> torch.Tensor:
    """Something for the schedule, which wants a loss; the totals are what counts."""
    return sums.text_sum
