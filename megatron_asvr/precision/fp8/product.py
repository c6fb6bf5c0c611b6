"""A linear whose three matrix products are in 8 bits: the output and both gradients.

Operands are rounded to 8 bits (``quantize.py``) and then multiplied in fp32, as tensor cores do up
to the order of their sums. Block recipes cut an operand along the axis that is summed over, so the
same matrix is rounded in two ways for two products; one scale for a whole matrix serves both.
Nothing here depends on chance or on what was computed before in the same step: delayed scales
change only between steps (``Emulator.update``). So computing a layer again for its backward pass,
or the order of micro-batches, changes no rounding.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron-core)

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from megatron_asvr.config.schema import Fp8Config
from megatron_asvr.precision.fp8 import quantize
from megatron_asvr.precision.fp8.drift import Drift
from megatron_asvr.precision.fp8.quantize import BLOCK, E4M3, E5M2, ROLES, Quantized, Role
from megatron_asvr.precision.fp8.shapes import check_product, pad_rows
from megatron_asvr.precision.products import look_up, multiply

Axis = Literal[0, 1]
Operand = tuple[Tensor, Role, Axis]  # the axis that is summed over


class Product:
    """What one linear needs for its products in 8 bits, beside its weight.

    Args:
        name: of the linear, canonical.
        settings: recipe and format.
        device: of the scales.

    Attributes:
        is_on: whether it multiplies in 8 bits; the guard turns it off.
        records: whether largest values are noted, for the scales of the next step.
        drift: while it is set, results are exact, and those in 8 bits are compared with them.
        amax: fp32 [3], largest values of this step so far, of ``ROLES``.
        scale: fp32 [3], of this step (delayed scaling only, like the next).
        history: fp32 [H, 3], largest values of earlier steps; the first row is overwritten next.
    """

    def __init__(self, name: str, settings: Fp8Config, *, device: torch.device) -> None:
        self.name, self.recipe, self._settings = name, settings.recipe, settings
        self.is_on, self.records = True, False
        self.drift: Drift | None = None
        self.amax = torch.zeros(len(ROLES), device=device)
        self.scale = torch.ones(len(ROLES), device=device)
        self.history = torch.zeros(settings.history, len(ROLES), device=device)

    def __call__(self, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        """The linear's output [M, N]; its gradients are in 8 bits, too.

        Args:
            x_MK: the input, its rows padded.
            weight_NK: the weight.
        """
        return _Multiply.apply(x_MK, weight_NK, self)

    def dtype(self, role: Role) -> torch.dtype:
        """The float8 type of a matrix."""
        return E5M2 if role == "gradient" and self._settings.format == "hybrid" else E4M3

    def quantized(self, x_RC: Tensor, role: Role, along: Axis) -> Quantized:
        """A matrix in 8 bits, to be summed over the axis ``along``."""
        dtype = self.dtype(role)
        if self.recipe == "block":
            strip = (BLOCK, 1) if along == 0 else (1, BLOCK)
            return quantize.by_block(x_RC, dtype, (BLOCK, BLOCK) if role == "weight" else strip)
        if self.recipe == "mxfp8":
            return quantize.mx(x_RC, dtype, along=along)
        if self.recipe == "current":
            return quantize.by_tensor(x_RC, dtype)
        place = ROLES.index(role)
        if self.records:
            self.amax[place] = torch.maximum(self.amax[place], quantize.largest(x_RC))
        return quantize.by_tensor(x_RC, dtype, self.scale[place])

    def multiply(self, left: Operand, right: Operand) -> Tensor:
        """The product of two matrices, [rows of the left one, rows of the right one].

        Args:
            left: [rows, sum], or [sum, rows] where the axis to sum over is 0.
            right: likewise.
        """
        rounded = []
        for x_RC, role, along in (left, right):
            made = self.quantized(x_RC, role, along)
            rounded.append((made.dequantized, along))
            if self.drift is not None:
                self.drift.count(role, x_RC, made)
        result = _contracted(*rounded)
        if self.drift is None:
            return result.to(left[0].dtype)
        exact = _contracted((left[0], left[2]), (right[0], right[2]))
        self.drift.compare(f"{left[1]} x {right[1]}", exact, result)
        return exact

    def next_scales(self, amax: Tensor) -> None:
        """Take the largest values of a step into the history, and forget those of this rank.

        Args:
            amax: [3], over all ranks.
        """
        settings = self._settings
        self.history[0] = amax
        recent = self.history.amax(0) if settings.amax == "max" else amax
        limits = torch.tensor([torch.finfo(self.dtype(role)).max for role in ROLES])
        self.scale.copy_(
            quantize.delayed_scale(
                recent, self.scale, largest=limits.to(amax.device), margin=settings.margin
            )
        )
        self.history.copy_(self.history.roll(-1, 0))
        self.history[0] = 0.0
        self.amax.zero_()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, product: Product | None) -> Tensor:
    """``x @ weight.T + bias``, in 8 bits where there is a product for it and it is on.

    Args:
        x: [..., K]; leading dimensions are free, and may hold nothing.
        weight: [..., K], whose leading dimensions have N rows together.
        bias: N numbers, or None; they are added in the type of ``x``.
        product: of this linear; None multiplies in the type of ``x``.
    """
    if product is None or not product.is_on or not x.numel():
        return multiply(x, weight, bias)
    weight, bias = weight.flatten(0, -2), None if bias is None else bias.flatten()
    rows = x.shape[:-1].numel()
    padded_MK = pad_rows(x.reshape(rows, -1), product.recipe)
    check_product(product.recipe, padded_MK, weight, name=product.name)
    y = product(padded_MK, weight)[:rows].view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def grouped_linear(x_DMK: Tensor, weight_DNK: Tensor, products: Sequence[Product | None]) -> Tensor:
    """Each depth's ``x`` times its own matrix, [D, M, N].

    Args:
        x_DMK: inputs.
        weight_DNK: weights.
        products: of each depth; where all have a kernel for it, it computes them together.
    """
    together = {getattr(product, "grouped", None) for product in products}
    if len(together) == 1 and (kernel := together.pop()) is not None and x_DMK.numel():
        return kernel(x_DMK, weight_DNK)
    each = zip(x_DMK, weight_DNK, products, strict=True)
    return torch.stack([linear(x_MK, w_NK, None, product) for x_MK, w_NK, product in each])


def multiply_by_ours(chunk: nn.Module) -> None:
    """Let megatron-core's linears and embedding add to gradient buffers as ours do.

    Args:
        chunk: of the model, on a CPU and whole. Under tensor parallelism, and on a GPU,
            megatron-core overlaps products and sums, and keeps only this rank's positions.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module._forward_impl = partial(parallel_linear, None)
        elif isinstance(module, VocabParallelEmbedding):
            module.forward = partial(_embedded, module)


def _embedded(module: nn.Module, ids: Tensor) -> Tensor:
    return look_up(module.weight, ids)


def parallel_linear(
    product: Product | None,
    *,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Any,
    **_: Any,
) -> Tensor:
    """What megatron-core's parallel linears compute (their ``_forward_impl``).

    Args:
        product: of the linear in 8 bits; None multiplies in the type of ``input``.
        input: this rank's part of the positions under sequence parallelism.
        weight: this rank's.
        bias: this rank's, or None.
        allreduce_dgrad: ranks give parts of the input's gradient, to be summed.
        sequence_parallel: positions are split over the group.
        tp_group: the ranks that share the weight.
    """
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(
            input, tensor_parallel_output_grad=True, group=tp_group
        )
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    return linear(input, weight, bias, product)


def _contracted(left: tuple[Tensor, Axis], right: tuple[Tensor, Axis]) -> Tensor:
    """The product of two matrices over the axis that is named beside each."""
    (a, along_a), (b, along_b) = left, right
    return (a if along_a else a.T) @ (b.T if along_b else b)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, product: Product) -> Tensor:
        ctx.product = product
        ctx.save_for_backward(x_MK, weight_NK)
        return product.multiply((x_MK, "input", 1), (weight_NK, "weight", 1))

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_MK, weight_NK = ctx.saved_tensors
        product, grads = ctx.product, [None, None]
        if ctx.needs_input_grad[0]:
            grads[0] = product.multiply((grad_MN, "gradient", 1), (weight_NK, "weight", 0))
        if ctx.needs_input_grad[1]:
            grads[1] = product.multiply((grad_MN, "gradient", 0), (x_MK, "input", 0))
        return *grads, None
