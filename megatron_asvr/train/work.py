"""How much of a run's time was of use: what its samples need computed, and where the rest went.

The operations that a step needs follow from counts of its samples (parallel/costs.py); padding,
recomputation and codes from a cache add none. The counts ride on the sums that every step makes
over the world, so nothing waits for them.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_asvr.platforms import select
from megatron_asvr.platforms.peaks import measured_flops

import torch

from megatron_asvr.batch import MicroBatch
from megatron_asvr.checkpoint.meta import ResumeState
from megatron_asvr.config.schema import Config
from megatron_asvr.model.asvr import DTYPES
from megatron_asvr.model.tokenizer import VisualTokenizer
from megatron_asvr.parallel.collectives import all_reduce_sum
from megatron_asvr.parallel.costs import Counts, Rates, encoder_cost, rates, tokenizer_cost
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.train.metrics import Window, kept_lines


class Work:
    """Counts what steps need; every rank has one.

    Args:
        config: the run.
        tokenizer: the visual tokenizer, None without a visual loss.
        joined: one pass of the encoder gives features and codes (model/images.py).
        groups: process groups of the layout.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: VisualTokenizer | None,
        *,
        joined: bool = False,
        groups: Groups,
    ) -> None:
        self._rates, self._groups = useful_rates(config, tokenizer, joined=joined), groups
        self._sliding_window = config.model.language.sliding_window
        self._drawn_share = config.loss.visual_positions
        platform, dtype = select()[0], DTYPES[config.train.precision]
        self._peak = platform.peak_flops(dtype) or measured_flops(platform, dtype)

    def counts(self, batches: Sequence[MicroBatch]) -> list[int]:
        """This rank's part of sums over the world.

        They are: images, patches, pairs, positions with codes that were drawn, places of all rows.

        Args:
            batches: its micro-batches of a step.
        """
        groups, found = self._groups, [0] * 5
        if groups.tp_rank:
            return found
        if groups.is_first_stage:
            found[1] = sum(batch.image_positions_P.numel() for batch in batches)
        if groups.is_last_stage:
            found[3] = sum(batch.visual_positions_M.numel() for batch in batches)
        if groups.is_last_stage and groups.cp_rank == 0:  # known to all who share the sequences
            found[0] = sum(batch.num_images for batch in batches)
            found[2] = sum(num_pairs(batch, self._sliding_window) for batch in batches)
            found[4] = sum(batch.document_BS.numel() for batch in batches)
        return found

    def values(self, window: Window) -> dict[str, float]:
        """What a line of metrics says about some steps; all ranks take part.

        Args:
            window: the steps.
        """
        images, patches, pairs, drawn, slots = window.work
        counts = Counts(
            images=images,
            patches=patches,
            positions=window.num_tokens,
            pairs=pairs,
            labels=window.totals[1],
            codes=drawn / self._drawn_share,  # the rate is that of a share of them
        )
        parts = self._rates.parts(counts)
        ranks = self._groups.world.size()
        flops = sum(parts.values()) / window.train_s / ranks
        stages = self._groups.plan.pp
        mine = torch.zeros(1 + stages, device=select()[0].device)
        mine[0], mine[1 + self._groups.pp_rank] = window.wait_s, window.busy_s
        waited_s, *busy_s = all_reduce_sum(mine, group=self._groups.world).tolist()
        idle = [1 - s * stages / ranks / window.passes_s for s in busy_s] if stages > 1 else []
        return {
            "tflops": flops / 1e12,
            "mfu": flops / self._peak,
            **{f"tflop_{part}": x / window.steps / 1e12 for part, x in parts.items() if x},
            "padding": 1 - window.num_tokens / slots,
            "rank_wait": waited_s / ranks / window.train_s,
            **({"bubble": sum(idle) / stages} if idle else {}),
            **{f"bubble_{stage}": share for stage, share in enumerate(idle)},
        }


def useful_rates(
    config: Config, tokenizer: VisualTokenizer | None, *, joined: bool = False
) -> Rates:
    """The rates of a run with exactly this tokenizer, without what is computed again.

    The arguments are those of ``Work``.
    """
    if tokenizer is None:
        return rates(config, (), useful=True)
    sizes, width = tokenizer.codebook_sizes, tokenizer.width
    found = rates(config, sizes, useful=True, code_width=width)
    if not found.tokenizer:
        return found
    encoder = tokenizer.encoder.config if tokenizer.encoder is not None else None
    cost = tokenizer_cost(config, sizes, encoder, width)
    if joined and encoder is not None:  # the layers that both need run once
        cost -= min(encoder_cost(encoder), encoder_cost(config.model.vision))
    return replace(found, tokenizer=cost)


def num_pairs(batch: MicroBatch, sliding_window: int | None) -> int:
    """Pairs of a position and one that it attends to, of all documents.

    A position sees as many as its rotary position says: its own branch goes on right after the
    shared prefix.

    Args:
        batch: one micro-batch.
        sliding_window: positions that a token sees, itself included; None is all.
    """
    seen_BS = batch.position_ids_BS + 1
    if sliding_window is not None:
        seen_BS = seen_BS.clamp(max=sliding_window)
    return int(seen_BS[batch.document_BS >= 0].sum())


def with_past(done: ResumeState, metrics: Path) -> ResumeState:
    """Where a run stands, with the time that its earlier starts took after that checkpoint.

    What they did since is lost, as far as its lines of metrics tell.

    Args:
        done: of the checkpoint that is continued from.
        metrics: the run's lines, those after the checkpoint still among them.
    """
    lines = map(json.loads, kept_lines(metrics, sys.maxsize))
    elapsed_s = max([done.elapsed_s, *(line.get("elapsed_s", 0.0) for line in lines)])
    lost_s = done.lost_s + elapsed_s - done.elapsed_s
    return replace(done, elapsed_s=elapsed_s, lost_s=lost_s)
