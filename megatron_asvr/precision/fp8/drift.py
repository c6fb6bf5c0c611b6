"""How far the products of one linear in 8 bits are from exact ones, from the same operands.

Compared on the same operands, a linear answers for itself alone: what its neighbours round does not
count. Numbers are sums, so that those of several ranks and micro-batches can be added up.
"""

import math

import torch
from torch import Tensor

from megatron_asvr.precision.fp8.quantize import ROLES, Quantized, Role

KINDS = ("input x weight", "gradient x weight", "gradient x input")  # output and both gradients
_CLAMPED = 1.001  # above the format's largest by more than the rounding of a scale


class Drift:
    """Sums of one linear.

    Args:
        device: of the sums.

    Attributes:
        products: fp64 [3, 3]: for each of ``KINDS`` exact x rounded, exact ** 2, rounded ** 2.
        values: fp64 [3, 3]: for each of ``ROLES`` the values that are not 0, how many of them
            became 0, and how many were clamped.
    """

    def __init__(self, *, device: torch.device) -> None:
        self.products = torch.zeros(len(KINDS), 3, dtype=torch.float64, device=device)
        self.values = torch.zeros(len(ROLES), 3, dtype=torch.float64, device=device)

    def compare(self, kind: str, exact: Tensor, rounded: Tensor) -> None:
        """Add a product and what became of it.

        Args:
            kind: one of ``KINDS``.
            exact: any shape and floating type.
            rounded: of the same shape, from operands in 8 bits.
        """
        x, y = exact.double(), rounded.double()
        sums = [(x * y).sum(), (x * x).sum(), (y * y).sum()]
        self.products[KINDS.index(kind)] += torch.stack(sums)

    def count(self, role: Role, x_RC: Tensor, made: Quantized) -> None:
        """Add a matrix and what became of it.

        Args:
            role: one of ``ROLES``.
            x_RC: the matrix, any floating type.
            made: the same in 8 bits.
        """
        stands_for = made.dequantized.abs()
        magnitude, some = x_RC.detach().abs(), x_RC != 0
        most = stands_for.new_tensor(torch.finfo(made.data_RC.dtype).max)
        full = made.data_RC.float().abs() == most
        counts = [some, some & (stands_for == 0), full & (magnitude > stands_for * _CLAMPED)]
        self.values[ROLES.index(role)] += torch.stack([x.sum() for x in counts])


def cosines(products: Tensor) -> list[float | None]:
    """Cosine of each of ``KINDS``; None where there was nothing to compare with: zeros, inf or NaN.

    Where all that was rounded became zero, or some of it inf or NaN, it is 0.

    Args:
        products: ``Drift.products``, summed.
    """
    found: list[float | None] = []
    for dot, exact, rounded in products.tolist():
        if not exact or not math.isfinite(exact):
            found.append(None)
        elif not rounded or not math.isfinite(dot) or not math.isfinite(rounded):
            found.append(0.0)
        else:
            found.append(dot / (exact * rounded) ** 0.5)
    return found


def shares(values: Tensor) -> dict[str, float]:
    """Share of the values that are not 0 which became 0, and which were clamped, by name.

    Args:
        values: ``Drift.values``, summed.
    """
    found = {}
    for role, (some, lost, clamped) in zip(ROLES, values.tolist(), strict=True):
        found[f"{role}_underflow"] = lost / max(some, 1)
        found[f"{role}_overflow"] = clamped / max(some, 1)
    return found
