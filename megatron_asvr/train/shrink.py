"""A small model with the structure of a large one, for certifying a layout in minutes."""

import math
from dataclasses import replace

from megatron_asvr.config.schema import (
    Config,
    LanguageConfig,
    ParallelConfig,
    VisionConfig,
    VisualHeadConfig,
)

HEAD_WIDTH = 16  # of one attention head
MIN_LAYERS = 2
MIN_HEADS = 2

Stages = tuple[int, ...] | None


def shrink(config: Config) -> Config:
    """The configuration with fewer layers and heads and smaller widths.

    What a layout divides keeps its proportions: query heads per key/value head, widths against
    each other, empty and uneven pipeline stages. What data and tokenizers fix stays: vocabulary,
    patches, codebooks; so do experts.

    Args:
        config: a run that fits its own ``parallel`` settings, as the result does; without
            sources of weights, because none would fit.
    """
    p = config.parallel
    language, stages = _language(config.model.language, p)
    return replace(
        config,
        model=replace(
            config.model,
            language=language,
            vision=_vision(config.model.vision),
            visual_head=_visual_head(config.model.visual_head, p.tp),
        ),
        parallel=replace(p, stages=stages),
    )


def _language(lm: LanguageConfig, p: ParallelConfig) -> tuple[LanguageConfig, Stages]:
    """The small language model, and its layers for each stage where those are given."""
    stages, layers = p.stages, min(lm.num_layers, max(MIN_LAYERS, p.pp * (p.vpp or 1)))
    if stages is not None:
        most = max(stages)
        uneven = min(n for n in stages if n) < most
        stages = tuple(min(1, n) + (uneven and n == most) for n in stages)
        layers = sum(stages)
    groups = _fewest(lm.kv_heads, p.tp)
    heads = groups * (lm.num_heads // lm.kv_heads)
    head_width = min(HEAD_WIDTH, lm.width_per_head)
    width_ratio = lm.hidden_size / (lm.num_heads * lm.width_per_head)
    hidden = _scaled(width_ratio * heads * head_width, p.tp)
    return (
        replace(
            lm,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=groups,
            head_dim=head_width,
            hidden_size=hidden,
            ffn_hidden_size=_scaled(hidden * lm.ffn_hidden_size / lm.hidden_size, p.tp),
            expert_ffn_hidden_size=lm.expert_ffn_hidden_size
            and _scaled(hidden * lm.expert_ffn_hidden_size / lm.hidden_size, p.tp),
        ),
        stages,
    )


def _vision(vision: VisionConfig) -> VisionConfig:
    """The small encoder: as many patches, and as many layers above the selected one up to one."""
    used = min(vision.num_feature_layers, MIN_LAYERS)
    layers = used + min(vision.num_layers - vision.num_feature_layers, 1)
    heads = min(vision.num_heads, MIN_HEADS)
    hidden = heads * min(HEAD_WIDTH, vision.hidden_size // vision.num_heads)
    return replace(
        vision,
        num_layers=layers,
        feature_layer=used - layers - 1,
        num_heads=heads,
        hidden_size=hidden,
        ffn_hidden_size=_scaled(hidden * vision.ffn_hidden_size / vision.hidden_size, 1),
    )


def _visual_head(head: VisualHeadConfig, tp: int) -> VisualHeadConfig:
    """The small visual head: its attention is split or replicated as the large one's."""
    heads = _fewest(head.heads, tp) if head.heads % tp == 0 else head.heads
    return replace(
        head,
        num_layers=min(head.num_layers, MIN_LAYERS),
        num_heads=heads,
        # Wherever the attention heads are not divided, the width is.
        width=min(head.width, math.lcm(heads, tp) * HEAD_WIDTH),
    )


def _fewest(heads: int, tp: int) -> int:
    """The smallest divisor of ``heads`` that ``tp`` divides, and at least two heads if it can."""
    fits = [n for n in range(tp, heads + 1, tp) if heads % n == 0]
    return next((n for n in fits if n >= MIN_HEADS), fits[-1])


def _scaled(width: float, multiple: int) -> int:
    """A width near ``width``, a multiple of what divides it and of 8."""
    step = math.lcm(8, multiple)
    return max(1, round(width / step)) * step
