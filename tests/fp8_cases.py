"""A model whose widths every recipe takes, and the recipes' arithmetic once more, in float64."""

from typing import Any

import torch
from torch import Tensor

from megatron_asvr.config.schema import Config
from megatron_asvr.precision.fp8.quantize import E4M3, E5M2
from tests.run_cases import config

RECIPES = ("delayed", "current", "block", "mxfp8")
# float8 type, bits of the mantissa, least exponent, largest value
FORMATS = {"e4m3": (E4M3, 3, -6, 448.0), "e5m2": (E5M2, 2, -14, 57344.0)}
TREE: dict[str, Any] = {
    "model__language__hidden_size": 256,
    "model__language__ffn_hidden_size": 256,
    "model__language__num_kv_heads": 4,
    "model__language__vocab_size": 200,
    "model__language__init_std": 0.02,
    "model__vision__hidden_size": 128,
    "model__vision__ffn_hidden_size": 128,
    "model__visual_head__width": 256,
    "model__visual_head__init_std": 0.02,
}
HEADS = ("visual_head.heads.*",)  # of the small codebooks of the tests


def run_of(recipe: str, *, exclude: tuple[str, ...] = HEADS, **changes: Any) -> Config:
    """The small run with emulated products in 8 bits; ``none`` leaves them out."""
    fp8 = {
        "precision__fp8__recipe": recipe,
        "precision__fp8__emulate": recipe != "none",
        "precision__fp8__exclude": list(exclude),
        "precision__fp8__history": 3,
    }
    return config(**{**TREE, **fp8, **changes})


def nearest(x: Tensor, form: str) -> Tensor:
    """The nearest numbers of a format, ties to even, no further than its largest; in float64."""
    _, mantissa, least, most = FORMATS[form]
    exponent = torch.floor(torch.log2(x.abs().clamp(min=1e-300))).clamp(min=least)
    step = 2.0 ** (exponent - mantissa)
    return torch.round(x / step).mul(step).clamp(-most, most)


def by_definition(
    x_RC: Tensor, form: str, block: tuple[int, int], scale: str, given: float = 1.0
) -> Tensor:
    """What a matrix in 8 bits stands for, from the recipe's words, block by block in float64.

    Args:
        x_RC: the matrix.
        form: one of ``FORMATS``.
        block: rows and columns that share a scale.
        scale: ``exact``, ``power`` and ``mx`` from the largest value, or ``given``.
        given: that one.
    """
    most, (rows, columns) = FORMATS[form][3], block
    parts = (
        x_RC.detach()
        .double()
        .reshape(x_RC.shape[0] // rows, rows, x_RC.shape[1] // columns, columns)
    )
    top = parts.abs().amax((1, 3), keepdim=True)
    factor = {
        "given": torch.full_like(top, given),
        "exact": most / top,
        "power": 2.0 ** torch.floor(torch.log2(most / top)),  # the largest without overflow
        "mx": 2.0 ** -torch.ceil(torch.log2(top / most)),  # the same, by rounding up
    }[scale]
    factor = torch.where(top > 0, factor, 1.0)
    return (nearest(parts * factor, form) / factor).reshape(x_RC.shape)
