"""Number of parameters of every part, from the configuration alone."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_asvr.config.schema import LanguageConfig, ModelConfig, VisionConfig, VisualHeadConfig


def count_parameters(
    model: ModelConfig, codebook_sizes: Sequence[int] | None, code_width: int | None = None
) -> dict[str, int]:
    """Parameters of each part, vocabulary and codebooks without padding.

    Args:
        model: the model's sizes.
        codebook_sizes: codes of every depth; None when no visual head is built.
        code_width: width of a code vector; the encoder's width by default.
    """
    lm, vision = model.language, model.vision
    counts = {
        "vision_encoder": _vision(vision),
        "projector": _linear(vision.hidden_size * model.resolution.num_scales, lm.hidden_size)
        + _linear(lm.hidden_size, lm.hidden_size)
        + (lm.hidden_size if model.resolution.newline else 0),
        "language_model": _language(lm),
    }
    if codebook_sizes is not None:
        width = code_width or vision.hidden_size
        counts["visual_head"] = _head(model.visual_head, lm.hidden_size, codebook_sizes, width)
    return counts


def left_out(vision: VisionConfig) -> int:
    """Parameters of the encoder behind its selected layer: training neither runs nor holds them."""
    used = replace(vision, num_layers=vision.num_feature_layers)
    return _vision(vision) - _vision(used) + 2 * vision.hidden_size


def _linear(rows: int, columns: int, *, bias: bool = True) -> int:
    return rows * columns + (columns if bias else 0)


def _vision(v: VisionConfig) -> int:
    h, norm = v.hidden_size, 2 * v.hidden_size
    layer = 2 * norm + 4 * _linear(h, h) + _linear(h, v.ffn_hidden_size)
    layer += _linear(v.ffn_hidden_size, h)
    patches = _linear(3 * v.patch_size**2, h) + v.num_patches * h
    return patches + v.num_layers * layer + norm


def _language(lm: LanguageConfig) -> int:
    h, d = lm.hidden_size, lm.width_per_head
    queries, keys = lm.num_heads * d, lm.kv_heads * d
    layer = 2 * h + _linear(h, queries + 2 * keys, bias=lm.qkv_bias)
    layer += _linear(queries, h, bias=False)
    experts = (lm.num_experts or 1) if lm.is_mixture else 1
    width = lm.expert_ffn if lm.is_mixture else lm.ffn_hidden_size
    layer += experts * 3 * _linear(h, width, bias=False)
    layer += _linear(h, experts, bias=False) if lm.is_mixture else 0  # the router
    layer += 2 * d if lm.qk_norm else 0
    vocabularies = 1 if lm.tied_embeddings else 2
    return vocabularies * lm.vocab_size * h + lm.num_layers * layer + h


def _head(head: VisualHeadConfig, hidden: int, sizes: Sequence[int], code_width: int) -> int:
    e = head.width
    layer = 2 * e + 4 * _linear(e, e) + len(sizes) * 4 * e * e
    trunk = _linear(hidden, e) + _linear(e, e) + _linear(code_width, e)
    return trunk + head.num_layers * layer + e + sum(_linear(e, k) for k in sizes)
