"""Rotary frequencies, and the scalings for more positions than a model was trained on."""

import math

import torch
from torch import Tensor

from megatron_asvr.config.schema import LanguageConfig, RopeScalingConfig


def frequencies(config: LanguageConfig, device: torch.device | None = None) -> Tensor:
    """Angle that each pair of channels turns by from one position to the next, float32 [C / 2].

    Args:
        config: the language model; C is its width per head.
        device: of the result, default: the CPU.

    Source: Hugging Face transformers 5.23, modeling_rope_utils.py. llama3 and yarn divide low
    frequencies by the factor, keep high ones, and go from one to the other between two limits.
    """
    width, scaling = config.width_per_head, config.rope_scaling
    exponent = torch.arange(0, width, 2, device=device).float() / width
    plain = 1.0 / config.rope_theta**exponent
    if scaling.rope_type == "default":
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    if scaling.rope_type == "llama3":
        kept = _llama3_kept(plain, scaling)
    else:
        kept = _yarn_kept(config).to(plain.device)
    return plain / scaling.factor * (1 - kept) + plain * kept


def _llama3_kept(plain: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """How much of each frequency is kept, by the turns it makes in the original positions."""
    turns = plain * _original(scaling) / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_kept(config: LanguageConfig) -> Tensor:
    """The same, by the channel's index between those of two numbers of turns (arXiv 2309.00071)."""
    width, scaling = config.width_per_head, config.rope_scaling

    def channel(turns: float) -> float:
        radians = _original(scaling) / (turns * 2 * math.pi)
        return width * math.log(radians) / (2 * math.log(config.rope_theta))

    low = max(math.floor(channel(scaling.beta_fast)), 0)
    high = min(math.ceil(channel(scaling.beta_slow)), width - 1)
    span = high - low or 0.001
    return 1 - ((torch.arange(width // 2).float() - low) / span).clamp(0, 1)


def _original(scaling: RopeScalingConfig) -> int:
    assert scaling.original_max_position_embeddings is not None  # config/check.py
    return scaling.original_max_position_embeddings


def softmax_scale(config: LanguageConfig) -> float | None:
    """What multiplies the attention scores, or None where it is 1 / sqrt(width per head).

    yarn multiplies rotated queries and keys by one factor each, so their product by its square.
    """
    scaling = config.rope_scaling
    if scaling.rope_type != "yarn":
        return None
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
    return factor**2 / math.sqrt(config.width_per_head)
