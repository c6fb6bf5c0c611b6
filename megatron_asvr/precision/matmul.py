"""fp32 results of matrix products, written or added to memory that is there.

Torch rounds a product of bf16 matrices to bf16. MKL, which torch brings with it on x86, gives it
in fp32 and adds it to a gradient buffer as it goes (docs/performance.md has the rates of both).
"""

import ctypes
import functools
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

logger = logging.getLogger(__name__)

_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112  # of cblas.h


def add_product(
    total_MN: Tensor, a_MK: Tensor, b_KN: Tensor, *, scale: float = 1.0, keep: float = 1.0
) -> None:
    """Make ``total`` into ``keep * total + scale * a b``.

    Args:
        total_MN: fp32, its rows contiguous; or a stack of such matrices.
        a_MK: fp32 or bf16; a stack of as many matrices.
        b_KN: likewise.
        scale: of the product.
        keep: of what ``total`` holds; 0 overwrites it, whatever it is.
    """
    if total_MN.dim() == 3:
        if a_MK.dtype == torch.float32:
            total_MN.baddbmm_(a_MK, b_KN, beta=keep, alpha=scale)
            return
        for total, a, b in zip(total_MN, a_MK, b_KN, strict=True):
            add_product(total, a, b, scale=scale, keep=keep)
    elif a_MK.dtype == torch.float32:
        total_MN.addmm_(a_MK, b_KN, beta=keep, alpha=scale)
    elif total_MN.device.type != "cpu":
        if keep != 1.0:
            total_MN.mul_(keep) if keep else total_MN.zero_()
        total_MN.add_(a_MK @ b_KN, alpha=scale)
    elif _mkl() is None:
        total_MN.addmm_(a_MK.float(), b_KN.float(), beta=keep, alpha=scale)
    elif total_MN.numel() and not isinstance(total_MN, FakeTensor):  # the planner's have no memory
        _by_mkl(total_MN, a_MK, b_KN, scale, keep)


def _by_mkl(total: Tensor, a: Tensor, b: Tensor, scale: float, keep: float) -> None:
    """``add_product`` of bf16 matrices on a CPU."""
    assert a.dtype == b.dtype == torch.bfloat16
    assert total.dtype == torch.float32
    assert total.stride(1) == 1 or total.shape[1] == 1
    assert (*total.shape, a.shape[1]) == (a.shape[0], b.shape[1], b.shape[0])
    (a, turn_a, step_a), (b, turn_b, step_b) = _layout(a), _layout(b)
    _mkl()(
        *(_ROW_MAJOR, turn_a, turn_b, *total.shape, a.shape[1]),
        *(scale, a.data_ptr(), step_a, b.data_ptr(), step_b),
        *(keep, total.data_ptr(), max(total.stride(0), total.shape[1])),
    )


def _layout(x: Tensor) -> tuple[Tensor, int, int]:
    """The matrix as MKL can read it, whether it is to be transposed, and the step of its rows."""
    for turned, code in ((x, _PLAIN), (x.T, _TRANSPOSED)):
        (rows, columns), (step, one) = turned.shape, turned.stride()
        if one == 1 and step >= columns:
            return x, code, max(step, 1)
        if rows == 1 and one == 1:
            return x, code, max(columns, 1)
    return (x := x.contiguous()), _PLAIN, max(x.shape[1], 1)


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
