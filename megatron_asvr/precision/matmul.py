"""fp32 results of matrix products, written or added to memory that is there.

``add_product`` takes fp32 or bf16 operands. Torch rounds a product of bf16 matrices to bf16; MKL,
which torch brings with it on x86, gives it in fp32 and adds it to a gradient buffer as it goes.

With ``precision.split_fp32`` products of fp32 matrices are made of bf16 ones, where a CPU
multiplies those so much faster that it pays: ``parts`` splits a matrix into two whose sum it is to
16 bits, and three products of these replace one, all added up in fp32.
"""

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import kernels

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

logger = logging.getLogger(__name__)

_split = False  # what a run asked for, see split_products
Parts = tuple[Tensor, ...]  # a matrix, or two that add up to it
_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112  # of cblas.h


def parts(x: Tensor) -> Parts:
    """A matrix, or a stack of matrices, ready for ``add_product``.

    Args:
        x: fp32 or bf16, [..., rows, columns].
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or not splits():
        return (x,)
    if kernels.fit(x):
        x = x.contiguous()
        high, low = (torch.empty_like(x, dtype=torch.bfloat16) for _ in range(2))
        kernels.call("split", [x, high, low], x.numel())
        return high, low
    high = x.bfloat16()
    return high, torch.sub(x, high).bfloat16()


def splits() -> bool:
    """Whether products of fp32 matrices are made of bf16 ones on this CPU."""
    return _split


def split_products(wanted: bool) -> None:
    """Let products of fp32 matrices be made of bf16 ones from now on, or not.

    Where this cannot pay it is not done, and the log says why.

    Args:
        wanted: ``precision.split_fp32`` of the run.
    """
    global _split
    can, reason = split_reason()
    _split = wanted and can
    if wanted:
        logger.info("fp32 products %s: %s", "of three bf16 ones" if can else "as they are", reason)


@functools.cache
def split_reason() -> tuple[bool, str]:
    """Whether this CPU can gain by it, and why (not)."""
    if _mkl() is None:
        return False, "torch has no MKL here"
    if not torch.cpu._is_amx_tile_supported():
        return False, "the CPU has no AMX, without which three of bf16 take longer than one of fp32"
    return True, "AMX multiplies bf16, and MKL adds up in fp32"


def transposed(x: Parts) -> Parts:
    """The last two dimensions of a matrix exchanged."""
    return tuple(part.mT for part in x)


def add_product(
    total_MN: Tensor, a_MK: Parts, b_KN: Parts, *, scale: float = 1.0, keep: float = 1.0
) -> None:
    """Make ``total`` into ``keep * total + scale * a b``.

    Args:
        total_MN: fp32 [..., M, N], its rows contiguous.
        a_MK: from ``parts``, of one dtype with ``b_KN``; stacks of as many matrices.
        b_KN: likewise.
        scale: of the product.
        keep: of what ``total`` holds; 0 overwrites it, whatever it is.
    """
    if total_MN.dim() == 3:
        for d, total in enumerate(total_MN):
            each = [tuple(part[d] for part in x) for x in (a_MK, b_KN)]
            add_product(total, *each, scale=scale, keep=keep)
        return
    if len(a_MK) == 1 and a_MK[0].dtype == torch.float32:
        total_MN.addmm_(a_MK[0], b_KN[0], beta=keep, alpha=scale)
        return
    for a in a_MK:
        for b in b_KN:
            if len(a_MK) == 1 or not (a is a_MK[1] and b is b_KN[1]):  # the least part of four
                _add(total_MN, a, b, scale, keep)
                keep = 1.0


def _add(total: Tensor, a: Tensor, b: Tensor, scale: float, keep: float) -> None:
    """``add_product`` of bf16 matrices."""
    if total.device.type != "cpu":
        product = (a @ b).mul_(scale)
        total.copy_(product) if keep == 0 else total.mul_(keep).add_(product)
        return
    if isinstance(total, FakeTensor):  # the planner's
        return
    multiply = _mkl()
    if multiply is None:
        total.addmm_(a.float(), b.float(), beta=keep, alpha=scale)
        return
    if not total.numel():
        return
    (a, turn_a, step_a), (b, turn_b, step_b) = _layout(a), _layout(b)
    sizes = (*total.shape, a.shape[1])
    multiply(
        *(_ROW_MAJOR, turn_a, turn_b, *sizes, scale, a.data_ptr(), step_a),
        *(b.data_ptr(), step_b, keep, total.data_ptr(), max(total.stride(0), total.shape[1])),
    )


def _layout(x: Tensor) -> tuple[Tensor, int, int]:
    """The matrix as MKL can read it, whether it is to be transposed, and the step of its rows."""
    rows, columns = x.shape
    if x.stride(1) != 1 and columns > 1 and x.stride(0) != 1 and rows > 1:
        x = x.contiguous()
    if x.stride(1) == 1 or columns <= 1:
        return x, _PLAIN, max(x.stride(0), columns, 1)
    return x, _TRANSPOSED, max(x.stride(1), rows, 1)


@functools.cache
def _mkl() -> Any:
    """MKL's product of bf16 matrices with an fp32 result; None where torch brings none."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        found = ctypes.CDLL(str(library)).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError) as error:
        logger.info("products of bf16 matrices are made in fp32, no MKL is in torch: %s", error)
        return None
    number, real, place = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    found.argtypes = [number] * 6 + [real, place, number, place, number, real, place, number]
    found.restype = None
    return found
