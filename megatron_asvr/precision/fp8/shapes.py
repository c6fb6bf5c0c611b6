"""Which matrices can be multiplied in 8 bits, and rows of zeros where they cannot.

Transformer Engine refuses a tensor whose rows are not a multiple of 8 or whose width is not one of
16 (pytorch/utils.py, assert_dim_for_fp8_exec), and block recipes one that is not cut evenly into
blocks both ways (``is_quantizable`` of their quantizers). In the product that gives the gradient of
a weight the rows are what is summed over, and there cuBLAS wants 16, as megatron-core does
(fp8_utils.py, get_fp8_align_size).
"""

import torch
from torch import Tensor

from megatron_asvr.config.schema import Fp8Config
from megatron_asvr.errors import AsvrError

ROWS = {"delayed": 16, "current": 16, "block": 128, "mxfp8": 32}
WIDTHS = {"delayed": 16, "current": 16, "block": 128, "mxfp8": 32}


def pad_rows(x_MK: Tensor, recipe: str) -> Tensor:
    """``x`` with rows of zeros behind it, so that the recipe takes it.

    They change no result: a zero raises no largest value, and whatever becomes of these rows is cut
    off again, which gives them gradients of zero.

    Args:
        x_MK: any number of rows.
        recipe: of ``precision.fp8.recipe``.
    """
    missing = -len(x_MK) % ROWS[recipe]
    return x_MK if not missing else torch.cat([x_MK, x_MK.new_zeros(missing, x_MK.shape[1])])


def position_multiple(settings: Fp8Config) -> int:
    """What the positions of every rank must be a multiple of in Transformer Engine's layers.

    1 without them: the linears that pad their own rows need no more.
    """
    return 1 if settings.recipe == "none" or settings.emulate else ROWS[settings.recipe]


def width_problem(recipe: str, *, inputs: int, outputs: int) -> str | None:
    """Why a weight of these widths cannot be multiplied in 8 bits; None when it can."""
    multiple = WIDTHS[recipe]
    bad = [
        f"{size} {name}"
        for name, size in (("inputs", inputs), ("outputs", outputs))
        if size % multiple
    ]
    return f"{' and '.join(bad)}: no multiple of {multiple}" if bad else None


def check_product(recipe: str, x_MK: Tensor, weight_NK: Tensor, *, name: str) -> None:
    """Return when all three products of a linear can be done in 8 bits.

    Args:
        recipe: of ``precision.fp8.recipe``.
        x_MK: the input, padded.
        weight_NK: the weight.
        name: of the linear, for the error.

    Raises:
        AsvrError: Transformer Engine would refuse one of them.
    """
    problem = width_problem(recipe, inputs=weight_NK.shape[1], outputs=weight_NK.shape[0])
    if x_MK.shape[0] % ROWS[recipe]:
        problem = f"{x_MK.shape[0]} rows: no multiple of {ROWS[recipe]}"
    if problem is not None:
        raise AsvrError(
            f"{name} cannot be multiplied with {recipe} scaling: {problem}; pad it, or name it in "
            "precision.fp8.exclude"
        )
