"""Values in 8 bits, by the arithmetic of Transformer Engine's recipes: pure functions.

A tensor is cut into blocks (the whole tensor, 1 x 128, 128 x 128 or 1 x 32), each block is
multiplied with a scale that puts its largest value near the format's largest, clamped and rounded
to torch's float8 type. What multiplies in 8 bits sees ``Quantized.dequantized``.

Source: transformer_engine 2.20.2, pytorch/custom_recipes/reference_current_scaling.py (per tensor
and, with powers of two, per block), pytorch/quantization.py (_default_sf_compute: delayed), and the
E8M0 conversion of common/util/ptx.cuh (MXFP8), all as formulas.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Role = Literal["input", "weight", "gradient"]  # of a matrix in the three products of a linear
ROLES: tuple[Role, ...] = ("input", "weight", "gradient")
BLOCK = 128
MX_BLOCK = 32
_FP32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix in 8 bits.

    Attributes:
        data_RC: float8.
        inverse: fp32 factor of each block, [block rows, block columns]; [1, 1] for one scale.
        block: rows and columns of a block.
    """

    data_RC: Tensor
    inverse: Tensor
    block: tuple[int, int]

    @property
    def dequantized(self) -> Tensor:
        """What the 8 bits stand for, fp32 [R, C]."""
        return (_cut(self.data_RC.float(), self.block) * self.inverse[:, None, :, None]).view(
            self.data_RC.shape
        )


def current_scale(amax: Tensor, *, dtype: torch.dtype, source: torch.dtype) -> Tensor:
    """Scales that put each largest value on the format's largest; fp32, in the shape of ``amax``.

    Args:
        amax: fp32 largest magnitudes.
        dtype: the float8 type.
        source: type of the values; its largest is the scale where the quotient overflows.
    """
    # Not `max / amax`: torch computes that as a product with the reciprocal, which rounds twice.
    scale = torch.div(torch.tensor(torch.finfo(dtype).max, device=amax.device), amax)
    scale = torch.where(scale == torch.inf, torch.finfo(source).max, scale)
    return torch.where(amax == 0, 1.0, scale)


def power_of_two(scale: Tensor) -> Tensor:
    """The largest powers of two that are not above positive scales; 0 stays 0."""
    _, exponent = torch.frexp(scale)
    floor = torch.ldexp(torch.ones_like(scale), exponent - 1)
    return torch.where(scale > 0, floor, scale)


def delayed_scale(amax: Tensor, before: Tensor, *, largest: Tensor, margin: int) -> Tensor:
    """Scales of the next step; where the history tells nothing, those of before.

    Args:
        amax: fp32 largest magnitudes of the history.
        before: scales so far.
        largest: largest values of the formats.
        margin: the scales are smaller by ``2 ** margin``.
    """
    scale = largest / amax / 2**margin
    scale = torch.where((amax > 0) & amax.isfinite(), scale, before)
    return torch.where(scale.isinf(), _FP32_MAX, scale)


def largest(x: Tensor) -> Tensor:
    """Largest magnitude, fp32 scalar; 0 without values."""
    return x.detach().abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)


def by_tensor(x_RC: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Quantized:
    """A matrix with one scale.

    Args:
        x_RC: any floating type.
        dtype: the float8 type.
        scale: fp32 scalar; by default that of its own largest value.
    """
    if scale is None:
        scale = current_scale(largest(x_RC), dtype=dtype, source=x_RC.dtype)
    return _rounded(x_RC, dtype, scale.view(1, 1), scale.reciprocal().view(1, 1), x_RC.shape)


def by_block(x_RC: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> Quantized:
    """A matrix with a power of two as the scale of each block.

    Args:
        x_RC: any floating type; the block's sides divide its own.
        dtype: the float8 type.
        block: rows and columns.
    """
    amax = _block_largest(x_RC, block)
    scale = power_of_two(current_scale(amax, dtype=dtype, source=x_RC.dtype))
    return _rounded(x_RC, dtype, scale, scale.reciprocal(), block)


def mx(x_RC: Tensor, dtype: torch.dtype, *, along: Literal[0, 1]) -> Quantized:
    """A matrix with an E8M0 scale for each 32 values along an axis.

    Args:
        x_RC: any floating type; 32 divides the axis.
        dtype: the float8 type.
        along: the axis.
    """
    block = (MX_BLOCK, 1) if along == 0 else (1, MX_BLOCK)
    inverse = e8m0(_block_largest(x_RC, block) * (1.0 / torch.finfo(dtype).max)).float()
    # An exponent of 0 stands for values that are all tiny; they are left as they are.
    scale = torch.where(inverse > 2.0**-127, inverse.reciprocal(), 1.0)
    return _rounded(x_RC, dtype, scale, inverse, block)


def e8m0(x: Tensor) -> Tensor:
    """The smallest powers of two that are not below non-negative fp32 values, as float8_e8m0fnu."""
    bits = x.float().contiguous().view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    up = (mantissa > 0) & (exponent != 0xFE) & ~((exponent == 0) & (mantissa <= 0x400000))
    exponent = torch.where(x.isinf(), 0xFE, exponent + up.int())
    return torch.where(x.isnan(), 0xFF, exponent).to(torch.uint8).view(torch.float8_e8m0fnu)


def _cut(x_RC: Tensor, block: tuple[int, int]) -> Tensor:
    """[block rows, rows of a block, block columns, columns of a block]."""
    return x_RC.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1]))


def _block_largest(x_RC: Tensor, block: tuple[int, int]) -> Tensor:
    return _cut(x_RC.detach().abs(), block).amax((1, 3)).float()


def _rounded(
    x_RC: Tensor,
    dtype: torch.dtype,
    scale: Tensor,
    inverse: Tensor,
    block: tuple[int, int] | torch.Size,
) -> Quantized:
    rows, columns = block
    scaled = _cut(x_RC.detach().float(), (rows, columns)) * scale[:, None, :, None]
    limit = torch.finfo(dtype).max
    data_RC = scaled.clamp(-limit, limit).view(x_RC.shape).to(dtype)
    return Quantized(data_RC, inverse, (rows, columns))
