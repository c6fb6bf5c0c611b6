"""Linears split over a tensor-parallel group, for the parts that megatron-core does not build.

``tp`` is the group everywhere, or None when nothing is split; then torch.distributed is not used.
Column parallel: a rank holds some of the outputs. Row parallel: a rank holds some of the inputs,
and the outputs are summed.
"""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from megatron_asvr.errors import ConfigError
from megatron_asvr.model.sharding import mark
from megatron_asvr.parallel.collectives import copy_to_tp, reduce_from_tp
from megatron_asvr.precision.fp8.product import Product, linear


def degree(tp: ProcessGroup | None) -> int:
    """Ranks of the group; 1 without one."""
    return 1 if tp is None else tp.size()


def enter(x: Tensor, tp: ProcessGroup | None) -> Tensor:
    """A replicated ``x`` where the split computation begins: its gradient is summed."""
    return x if tp is None else copy_to_tp(x, group=tp)


def leave(x: Tensor, tp: ProcessGroup | None) -> Tensor:
    """The sum of the ranks' partial results ``x``."""
    return x if tp is None else reduce_from_tp(x, group=tp)


def share(name: str, size: int, tp: ProcessGroup | None) -> int:
    """This rank's part of a dimension of ``size``.

    Raises:
        ConfigError: the degree does not divide the size, called ``name`` in the message.
    """
    ways = degree(tp)
    if size % ways:
        fits = [str(n) for n in range(1, min(size, 64) + 1) if size % n == 0]
        raise ConfigError(
            f"parallel.tp={ways} does not divide {name}={size}; use a degree of {', '.join(fits)}"
        )
    return size // ways


def normal(*shape: int, dtype: torch.dtype, std: float) -> nn.Parameter:
    """A new parameter, normal around 0."""
    return nn.Parameter(torch.empty(shape, dtype=dtype).normal_(std=std))


def zeros(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A new parameter, all zero."""
    return nn.Parameter(torch.zeros(shape, dtype=dtype))


class ColumnLinear(nn.Module):
    """A linear whose outputs are split: replicated input, this rank's outputs.

    Args:
        name: what the output dimension is called in the configuration, for the error.
        inputs: width of the input.
        outputs: width of the full output.
        tp: the group, or None.
        dtype: of the parameters.
        std: of the initial weights.
    """

    def __init__(
        self,
        name: str,
        inputs: int,
        outputs: int,
        *,
        tp: ProcessGroup | None,
        dtype: torch.dtype,
        std: float,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.fp8: Product | None = None
        rows = share(name, outputs, tp)
        self.weight = mark(normal(rows, inputs, dtype=dtype, std=std), dim=0)
        self.bias = mark(zeros(rows, dtype=dtype), dim=0)

    def forward(self, x: Tensor) -> Tensor:
        """This rank's outputs [..., outputs / tp] of a replicated ``x`` [..., inputs]."""
        return linear(enter(x, self.tp), self.weight, self.bias, self.fp8)


class RowLinear(nn.Module):
    """A linear whose inputs are split: this rank's inputs, replicated output.

    The arguments are those of ``ColumnLinear``; ``name`` is that of the input dimension.
    """

    def __init__(
        self,
        name: str,
        inputs: int,
        outputs: int,
        *,
        tp: ProcessGroup | None,
        dtype: torch.dtype,
        std: float,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.fp8: Product | None = None
        columns = share(name, inputs, tp)
        self.weight = mark(normal(outputs, columns, dtype=dtype, std=std), dim=1)
        self.bias = zeros(outputs, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Replicated outputs [..., outputs] of this rank's ``x`` [..., inputs / tp]."""
        if self.tp is None:
            return linear(x, self.weight, self.bias, self.fp8)
        return leave(linear(x, self.weight, None, self.fp8), self.tp) + self.bias


class MLP(nn.Module):
    """Linear, exact GELU, linear: the projector's shape (``mlp2x_gelu``), used twice.

    Args:
        name: what the width between the linears is called in the configuration.
        inputs: width of the input.
        width: between the linears, and of the output.
        tp: the group, or None.
        dtype: of the parameters.
        std: of the initial weights.
    """

    def __init__(
        self,
        name: str,
        inputs: int,
        width: int,
        *,
        tp: ProcessGroup | None,
        dtype: torch.dtype,
        std: float,
    ) -> None:
        super().__init__()
        self.linear_1 = ColumnLinear(name, inputs, width, tp=tp, dtype=dtype, std=std)
        self.linear_2 = RowLinear(name, width, width, tp=tp, dtype=dtype, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """Replicated [..., width] of a replicated ``x`` [..., inputs]."""
        return self.linear_2(F.gelu(self.linear_1(x)))
