"""Losses on held-out data, teacher-forced."""

from megatron_asvr.platforms import select

import torch
import torch.distributed as dist

from megatron_asvr.config.schema import LossConfig
from megatron_asvr.data.loader import Loader
from megatron_asvr.model.asvr import AsvrModel
from megatron_asvr.model.loss import read_totals
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.train.step import to_device


@torch.no_grad()
def validate(
    model: AsvrModel, loader: Loader, loss: LossConfig, *, depth: int, groups: Groups
) -> dict[str, float]:
    """Losses and accuracies over the whole split, per target; the same on every rank.

    Args:
        model: the bare model.
        loader: of the split; every sample is met once.
        loss: the weight of the visual loss in ``loss``.
        depth: number of depths of the visual head, 0 without one.
        groups: process groups of the layout.
    """
    totals = torch.zeros(4 + 2 * depth, dtype=torch.float64, device=select()[0].device)
    model.eval()
    for step in range(loader.steps):
        for batch in loader.step(step):
            totals += model(to_device(batch)).totals()
    model.train()
    if groups.plan.dp > 1:
        dist.all_reduce(totals, group=groups.dp)
    values = read_totals(totals)
    joint = values["text_loss"] + loss.visual_weight * values.get("visual_loss", 0.0)
    return {"loss": joint, **values}
