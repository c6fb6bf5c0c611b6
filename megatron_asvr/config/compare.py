"""Whether the settings of two models mean the same weights and the same computation."""

from dataclasses import fields, replace
from typing import TypeVar

from megatron_asvr.config.schema import (
    LanguageConfig,
    ProjectorConfig,
    VisionConfig,
    VisualHeadConfig,
)

Part = TypeVar("Part", LanguageConfig, VisionConfig, ProjectorConfig, VisualHeadConfig)

# No property of weights: how they were first drawn, how far a run lets positions grow, which
# hidden state is read, and how experts are kept busy.
_FREE = {"init_std", "max_positions", "feature_layer", "router_aux_loss_coef"}


def differences(found: Part, wanted: Part) -> list[tuple[str, object, object]]:
    """(setting, value found, value wanted) of every setting that changes what weights compute.

    A setting left to its default equals the same value written out.
    """
    found, wanted = _written_out(found), _written_out(wanted)
    names = [f.name for f in fields(found) if f.name not in _FREE]
    pairs = [(name, getattr(found, name), getattr(wanted, name)) for name in names]
    return [(name, a, b) for name, a, b in pairs if a != b]


def _written_out(part: Part) -> Part:
    if isinstance(part, LanguageConfig):
        part = replace(part, num_kv_heads=part.kv_heads, head_dim=part.width_per_head)
        # A mixture has no other feed-forward part than its experts.
        ffn = part.expert_ffn if part.is_mixture else part.ffn_hidden_size
        return replace(part, ffn_hidden_size=ffn, expert_ffn_hidden_size=ffn)
    if isinstance(part, VisualHeadConfig):
        return replace(part, num_heads=part.heads)
    return part
