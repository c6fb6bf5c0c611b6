"""Weights that Transformer Engine keeps in 8 bits, written and read as plain numbers.

megatron-core makes the optimizer's fp32 weights from the numbers that a weight was created with,
which it keeps on the host for that, and not from the 8 bits. So whoever fills a weight after its
creation has to fill both.
"""

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron-core)

import torch
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

_ORIGIN = "_high_precision_init_val"  # Transformer Engine's, until there is an optimizer


def fill(parameter: Tensor, numbers: Tensor) -> None:
    """Let a parameter hold ``numbers``, rounded to its type.

    Args:
        parameter: any.
        numbers: in its shape.
    """
    with torch.no_grad():
        parameter.copy_(numbers)
        if (origin := getattr(parameter, _ORIGIN, None)) is not None:
            origin.copy_(numbers)


def numbers_of(parameter: Tensor) -> Tensor:
    """The values without their gradient; of a weight in 8 bits a copy of what it stands for."""
    if is_float8tensor(parameter):
        with torch.no_grad():
            return dequantize_fp8_tensor(parameter).detach()
    return parameter.detach()
