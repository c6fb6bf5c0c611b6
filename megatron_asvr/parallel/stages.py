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
from megatron_asvr.config.schema import Config, LanguageConfig, VisionConfig

TEXT_POSITIONS = 256  # of the typical sample, beside its one image; every second has a target
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

    The sample is one image and ``TEXT_POSITIONS`` of text (as many as ``data.max_length`` leaves).
    What nothing trained lies below needs no backward pass, what is frozen no weight gradient. The
    ranks of a stage share everything evenly but images, which are encoded whole: where there are
    fewer of them than ranks, the encoder costs more than its operations.

    Args:
        config: the run.
        codebook_sizes: codes of every depth; empty without a visual head.
    """
    lm, vision, trained = config.model.language, config.model.vision, config.train.trainable
    patches, width = vision.num_patches, lm.hidden_size
    text = max(0, min(TEXT_POSITIONS, config.data.max_length - patches))
    layer = _layer(lm, patches + text)
    projector = 2.0 * patches * width * (vision.hidden_size + width)
    labels = 2.0 * text / 2 * width * lm.vocab_size
    again = {"none": 0.0, "selective": layer[1], "full": sum(layer)}[config.train.recompute]
    uneven = _uneven_images(config, patches + text)
    encoder_trained, projector_trained, lm_trained = (
        part in trained for part in ("vision_encoder", "projector", "language_model")
    )
    into_projector = encoder_trained or projector_trained
    into_lm = into_projector or lm_trained
    return ItemCosts(
        encoder=_both_passes(*_encoder(vision), encoder_trained, encoder_trained) * uneven
        + _both_passes(projector, 0.0, projector_trained, into_projector),
        layer=_both_passes(*layer, lm_trained, into_lm) + into_lm * again,
        text_head=_both_passes(labels, 0.0, lm_trained, into_lm),
        visual_head=_visual_head(config, codebook_sizes, into_lm, uneven) if codebook_sizes else 0,
    )


def _both_passes(linear: float, attention: float, trained: bool, backward: bool) -> float:
    """Operations of both passes from those of the forward pass.

    Args:
        linear: with weights; the backward pass has one product for the input's gradient and, when
            trained, one for the weight's.
        attention: products of activations: two gradients.
        trained: the weights are.
        backward: the input needs a gradient.
    """
    return linear * (1 + trained + backward) + attention * (1 + 2 * backward)


def _encoder(vision: VisionConfig) -> tuple[float, float]:
    """Operations of the linears and of attention for one image."""
    n, f = vision.num_patches, vision.hidden_size
    linear = 2.0 * n * f * (4 * f + 2 * vision.ffn_hidden_size)
    return linear * vision.num_feature_layers, 4.0 * n * n * f * vision.num_feature_layers


def _layer(lm: LanguageConfig, positions: int) -> tuple[float, float]:
    """Operations of one layer's linears and of its (causal) attention."""
    queries, keys = lm.num_heads * lm.width_per_head, lm.kv_heads * lm.width_per_head
    mlp = 3 * lm.ffn_hidden_size
    if lm.is_mixture:
        mlp = 3 * lm.expert_ffn * lm.experts_per_token + (lm.num_experts or 0)
    weights = lm.hidden_size * (2 * queries + 2 * keys + mlp)
    return 2.0 * positions * weights, 2.0 * positions**2 * queries


def _visual_head(
    config: Config, codebook_sizes: Sequence[int], below: bool, uneven: float
) -> float:
    """Operations of the visual head and, online, of the tokenizer, for one image."""
    head, vision = config.model.visual_head, config.model.vision
    e, patches, depth = head.width, vision.num_patches, len(codebook_sizes)
    trained = "visual_head" in config.train.trainable
    backward = below or trained
    layers = 2.0 * patches * depth * head.num_layers * 8 * e * e
    attention = 2.0 * patches * depth**2 * head.num_layers * e
    around = config.model.language.hidden_size * e + e * e + e * sum(codebook_sizes)
    around += (depth - 1) * vision.hidden_size * e
    cost = _both_passes(layers + 2.0 * patches * around, attention, trained, backward)
    if config.train.recompute_visual_head and backward:
        cost += layers + attention
    if config.data.codes == "online":
        search = 2.0 * patches * vision.hidden_size * sum(codebook_sizes)
        cost += (sum(_encoder(vision)) + search) * uneven
    return cost


def _uneven_images(config: Config, positions: int) -> float:
    """How much longer the rank with most images works than an even share would take."""
    ranks = config.parallel.tp * config.parallel.cp
    images = config.train.micro_batch
    if config.data.packing:
        length = config.data.pack_length or config.data.max_length
        images *= max(1, length // positions)
    return math.ceil(images / ranks) * ranks / images
