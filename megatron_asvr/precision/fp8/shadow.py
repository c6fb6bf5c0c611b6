"""A linear compared with itself in 8 bits, whoever multiplies it.

Nothing has to be known of the products inside. The linear is computed twice from the same input,
and again twice from the same gradient of its output; results that go on are the exact ones.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_asvr.precision.fp8.drift import KINDS, Drift
from megatron_asvr.precision.fp8.product import Product
from megatron_asvr.precision.fp8.quantize import Role
from megatron_asvr.precision.fp8.shapes import pad_rows
from megatron_asvr.precision.products import into_buffers

Run = Callable[[Tensor, bool], Tensor]  # output of an input, in 8 bits if told so
Region = Callable[[], AbstractContextManager[Any]]


class Layer:
    """A linear with its weights that multiplies in 8 bits inside a region; it takes over its calls.

    Args:
        module: the linear; its ``forward`` gives the output and one thing more.
        rounding: rounds as the recipe says; for the counts of what is lost.
        exactly: a region in which the linear multiplies in the base precision.
        in_8_bits: a region in which it multiplies in 8 bits.

    Attributes:
        is_on: whether it multiplies in 8 bits where its caller does.
        drift: see ``Watchable``.
    """

    def __init__(
        self, module: nn.Module, rounding: Product, *, exactly: Region, in_8_bits: Region
    ) -> None:
        self.is_on = True
        self.drift: Drift | None = None
        self._module, self._rounding = module, rounding
        self._exactly, self._in_8_bits = exactly, in_8_bits
        self._forward = module.forward
        module.forward = self

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """What the linear gives."""
        if self.drift is not None and x.numel():
            return self._compared(x, self.drift), None
        if self.is_on:
            return self._forward(x, *args, **kwargs)
        with self._exactly():
            return self._forward(x, *args, **kwargs)

    def _compared(self, x: Tensor, drift: Drift) -> Tensor:
        def run(x: Tensor, in_8_bits: bool) -> Tensor:
            with self._in_8_bits() if in_8_bits else self._exactly():
                return self._forward(x)[0]

        others = [p for p in self._module.parameters() if p is not self._module.weight]
        weights = (self._module.weight, *others)
        return compared(run, x, self._operand(x), weights, drift, self._rounding)

    def _operand(self, x: Tensor) -> Tensor:
        """What is multiplied: the input, after the norm that may be part of the linear."""
        scale = getattr(self._module, "layer_norm_weight", None)
        if scale is None:
            return x
        with torch.no_grad():
            return nn.functional.rms_norm(x, x.shape[-1:], scale, self._module.eps)


def compared(
    run: Run,
    x: Tensor,
    operand: Tensor,
    weights: tuple[Tensor, ...],
    drift: Drift,
    rounding: Product,
) -> Tensor:
    """The exact output of a linear; its gradients are exact, too.

    Args:
        run: the linear.
        x: its input.
        operand: what is multiplied with the matrix, [..., K].
        weights: what ``run`` computes with, first the matrix [N, K].
        drift: gets the sums.
        rounding: see ``Layer``.
    """
    return _Compared.apply(run, drift, rounding, operand, x, *weights)


def _count(role: Role, x: Tensor, drift: Drift, rounding: Product) -> None:
    """Add a matrix and what becomes of it in 8 bits."""
    x_RC = x.detach().reshape(-1, x.shape[-1])
    if role != "weight":
        x_RC = pad_rows(x_RC, rounding.recipe)
    drift.count(role, x_RC, rounding.quantized(x_RC, role, 1))


class _Compared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        drift: Drift,
        rounding: Product,
        operand: Tensor,
        x: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.run, ctx.drift, ctx.rounding, ctx.weights = run, drift, rounding, weights
        ctx.save_for_backward(x)
        exact, rounded = (run(x, in_8_bits) for in_8_bits in (False, True))
        drift.compare(KINDS[0], exact, rounded)
        _count("input", operand, drift, rounding)
        _count("weight", weights[0], drift, rounding)
        return exact

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        exact, rounded = (
            _gradients(ctx, x, needed, gradient, in_8_bits) for in_8_bits in (False, True)
        )
        for kind, full, other in zip(KINDS[1:], exact, rounded, strict=False):
            if full is not None:
                ctx.drift.compare(kind, full, other)
        _count("gradient", gradient, ctx.drift, ctx.rounding)
        return None, None, None, None, *exact


def _gradients(
    ctx: Any, x: Tensor, needed: tuple[bool, ...], gradient: Tensor, in_8_bits: bool
) -> list[Tensor | None]:
    """Gradients of the input and of each weight; None where none is needed."""
    with torch.enable_grad(), into_buffers(False):
        x = x.detach().requires_grad_(needed[0])
        y = ctx.run(x, in_8_bits)
    wanted = [t for t, need in zip((x, *ctx.weights), needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, gradient))
    return [next(found) if need else None for need in needed]
