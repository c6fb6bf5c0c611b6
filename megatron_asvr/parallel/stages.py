"""Which layers of the language model a pipeline stage holds: a cost model and an exact split.

The model is a row of items that cannot be divided: the encoder (with the projector), the layers of
the language model, the LM head on positions with a text target, the visual head on image patches.
A pipeline cuts the row into chunks, one for each stage or, with virtual stages, several; a stage's
cost is the sum of its chunks, and the slowest stage sets the pace. Costs are floating-point
operations of a typical sample, forward and backward; they say nothing about memory, so
``parallel.stages`` overrules them.

The encoder stands in the first chunk. The last one holds both heads, or, ``head_alone``, the visual
head and nothing else, with the LM head at the end of the chunk before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_asvr.config.layout import can_stand_alone
from megatron_asvr.config.schema import Config
from megatron_asvr.parallel.costs import rates

TEXT_POSITIONS = 256  # of the typical sample, beside its one image
WORTH_IT = 1.02  # the first form unless it costs more than this times the second


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemCosts:
    """Cost of each item, all in one unit."""

    encoder: float
    layer: float
    text_head: float
    visual_head: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Layers of every chunk, and what each stage then costs.

    Attributes:
        layers: number of layers of every chunk; chunk v * pp + r is the v-th of stage r.
        costs: of every stage, all its chunks together.
        head_alone: the visual head is the last chunk.
    """

    layers: tuple[int, ...]
    costs: tuple[float, ...]
    head_alone: bool = False

    @property
    def imbalance(self) -> float:
        """Largest cost over the mean; 1 is perfect."""
        return max(self.costs) * len(self.costs) / sum(self.costs)

    def idle(self, micro_batches: int, vpp: int = 1) -> float:
        """Share of the passes' time in which the mean stage has nothing to do.

        The slowest stage works without a pause; before and after it the first micro-batch passes
        through the other stages, with virtual ones a chunk at a time. Exact for 1F1B with equal
        stages.

        Args:
            micro_batches: of a step.
            vpp: chunks of each stage.
        """
        longest, together = max(self.costs), sum(self.costs)
        time = micro_batches * longest + (together - longest) / vpp
        return 1 - micro_batches * together / (len(self.costs) * time)


def layer_split(config: Config, codebook_sizes: Sequence[int]) -> Split:
    """The split of a run: ``parallel.stages`` where given, else the best of both forms.

    Args:
        config: the run, checked.
        codebook_sizes: codes of every depth; empty without a visual head.
    """
    p, items = config.parallel, item_costs(config, codebook_sizes)
    if p.stages is not None:
        return given_split(items, p.stages, pp=p.pp, head_alone=bool(p.head_alone))
    num_layers, sizes = config.model.language.num_layers, {"pp": p.pp, "vpp": p.vpp or 1}
    if p.head_alone is None and can_stand_alone(config):
        return better_form(items, num_layers, **sizes)
    return best_split(items, num_layers, **sizes, head_alone=bool(p.head_alone))


def better_form(items: ItemCosts, num_layers: int, *, pp: int, vpp: int = 1) -> Split:
    """The best split of the first form, unless the second one's is clearly cheaper.

    So the largest stage costs at most ``WORTH_IT`` times that of the best contiguous split.

    Args:
        items: cost of each item.
        num_layers: of the language model.
        pp: pipeline stages, at least two.
        vpp: chunks of each stage.
    """
    together, alone = (
        best_split(items, num_layers, pp=pp, vpp=vpp, head_alone=form) for form in (False, True)
    )
    return alone if max(together.costs) > WORTH_IT * max(alone.costs) else together


def best_split(
    items: ItemCosts, num_layers: int, *, pp: int, vpp: int = 1, head_alone: bool = False
) -> Split:
    """The split whose most expensive stage is cheapest, among those of one form.

    The layers cost the same, so it is optimal to give each in turn to the stage that is cheapest
    so far. A stage levels its chunks in the same way.

    Args:
        items: cost of each item.
        num_layers: of the language model.
        pp: pipeline stages.
        vpp: chunks of each stage.
        head_alone: keep the last chunk for the visual head; needs two stages.
    """
    fixed = _fixed_costs(items, pp * vpp, head_alone)
    end = len(fixed) - head_alone  # chunks before it take layers
    stages = _level(num_layers, items.layer, [sum(fixed[i::pp]) for i in range(min(pp, end))])
    layers = [0] * len(fixed)
    for i, number in enumerate(stages):
        layers[i:end:pp] = _level(number, items.layer, fixed[i:end:pp])
    return given_split(items, layers, pp=pp, head_alone=head_alone)


def given_split(
    items: ItemCosts, layers: Sequence[int], *, pp: int, head_alone: bool = False
) -> Split:
    """The split with these layers, and its costs.

    Args:
        items: cost of each item.
        layers: of every chunk, see ``Split``.
        pp: pipeline stages.
        head_alone: the visual head is the last chunk.
    """
    fixed = _fixed_costs(items, len(layers), head_alone)
    chunks = [f + items.layer * n for f, n in zip(fixed, layers, strict=True)]
    costs = tuple(sum(chunks[i::pp]) for i in range(pp))
    return Split(layers=tuple(layers), costs=costs, head_alone=head_alone)


def _fixed_costs(items: ItemCosts, num_chunks: int, head_alone: bool) -> list[float]:
    """Cost of every chunk before it gets layers."""
    fixed = [0.0] * num_chunks
    fixed[0] += items.encoder
    fixed[-1 - head_alone] += items.text_head
    fixed[-1] += items.visual_head
    return fixed


def _level(number: int, cost: float, loads: Sequence[float]) -> list[int]:
    """How many of ``number`` equal items each bin gets: each goes where the load stays lowest."""
    counts = [0] * len(loads)
    for _ in range(number):
        lowest = min(range(len(loads)), key=lambda i: loads[i] + counts[i] * cost)
        counts[lowest] += 1
    return counts


def item_costs(config: Config, codebook_sizes: Sequence[int]) -> ItemCosts:
    """Operations of one typical sample, forward and backward, by item.

    The sample is one image, with all the views it can have, and ``TEXT_POSITIONS`` of text (as many
    as ``data.max_length`` leaves); costs.py counts. The ranks of a stage share everything evenly
    but images, which are encoded whole: where there are fewer of them than ranks, the encoder costs
    more than its operations.

    Args:
        config: the run.
        codebook_sizes: codes of every depth; empty without a visual head.
    """
    views = config.model.resolution.most_views
    patches = views * config.model.vision.num_patches
    text = max(0, min(TEXT_POSITIONS, config.data.max_length - patches))
    found = rates(config, codebook_sizes)
    costs = found.parts(found.typical(patches + text, views))
    uneven = _uneven_images(config, patches + text)
    return ItemCosts(
        encoder=costs["encoder"] * uneven + costs["projector"],
        layer=costs["language_model"] / config.model.language.num_layers,
        text_head=costs["text_head"],
        visual_head=costs["tokenizer"] * uneven + costs["visual_head"],
    )


def _uneven_images(config: Config, positions: int) -> float:
    """How much longer the rank with most images works than an even share would take."""
    ranks = config.parallel.tp * config.parallel.cp
    images = config.train.micro_batch * config.model.resolution.most_views
    if config.data.packing:
        length = config.data.pack_length or config.data.max_length
        images *= max(1, length // positions)
    return math.ceil(images / ranks) * ranks / images
