"""Activations that the backward pass makes again, because that costs next to nothing.

A linear keeps its input. Where that input is a norm, or a product of two halves, of something that
is kept in any case, it can be computed again in one pass over memory, by the same function and so
to the same bits. ``remember`` says how, ``remade`` surrounds the linear.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Make = Callable[[], Tensor]
_whole = False  # inside of kept_whole


def remember(made: Tensor, make: Make) -> Tensor:
    """``made``, which now knows how it is made; on the CPU alone, compilers know no such hooks.

    Args:
        made: a tensor that was just computed.
        make: gives its values again, without gradient, from tensors that are kept anyway.
    """
    if made.device.type == "cpu":
        made.remake = make  # type: ignore[attr-defined]
    return made


@contextlib.contextmanager
def kept_whole() -> Iterator[None]:
    """Inside, nothing is remade: for layers that are computed again as a whole."""
    global _whole
    before, _whole = _whole, True
    try:
        yield
    finally:
        _whole = before


def remade(made: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Inside, whoever saves ``made`` for the backward pass saves how to make it instead.

    Args:
        made: from ``remember``; of any other tensor nothing changes.
    """
    make = getattr(made, "remake", None)
    if make is None or _whole or not torch.is_grad_enabled():
        return contextlib.nullcontext()
    place, size = StorageWeakRef(made.untyped_storage()), made.numel()

    def pack(x: Tensor) -> Tensor | tuple[Make, torch.Size]:
        is_made = x.numel() == size and StorageWeakRef(x.untyped_storage()) == place
        return (make, x.shape) if is_made and x.is_contiguous() else x

    def unpack(kept: Tensor | tuple[Make, torch.Size]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[0]().view(kept[1])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
