"""Counts where a step would make its host wait for a GPU, in a run on the CPU.

On a GPU a host waits when it asks a tensor for its numbers, or for how many of them there are.
On the CPU nothing waits, but the same questions are asked.
"""

import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_asvr.platforms.cpu import CpuPlatform

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_asvr

HOME = Path(megatron_asvr.__file__).parent
# Operators whose result, or its shape, is of numbers on the device.
WAITS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"),
    *("unique_dim", "_unique2", "unique_consecutive", "bincount", "repeat_interleave"),
}
# Of tensors; those that no operator tells of.
METHODS = {"tolist", "numpy", "cpu", "__array__"}
THEIRS = "megatron/core/"
# Their tensors are made on the host and stay there: gradients of a loss, states of generators,
# lengths of documents.
HOST = {
    *("model/loss.py:scales_of", "megatron/core/tensor_parallel/random.py:fork"),
    *("batch.py:host_lengths", "batch.py:_runs", "precision/local.py:_documents"),
}
# What a step asks, whatever its number of micro-batches.
KNOWN = {
    "train/step.py:sum_parts": 2,  # the loss is wanted, then read from the host's copy
    "train/step.py:train_step": 2,  # a copy of it is looked at; time is taken where it waits anyway
    "megatron/core/utils.py:local_multi_tensor_l2_norm": 1,  # the CPU's form of a kernel
    "megatron/core/optimizer/clip_grads.py:get_grad_norm_fp32": 1,  # the norm is wanted
}


class Waits(TorchFunctionMode):
    """Inside, every question to a tensor is counted by the function that asked.

    The CPU platform's own functions do what a GPU's kernels do, and are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._operators = _Operators(self)

    def note(self) -> None:
        """Count one for the innermost function of this package or of megatron-core."""
        place = asker()
        if not (place.startswith("platforms/") or place in HOST):
            self.places[place] += 1

    def __enter__(self) -> "Waits":
        super().__enter__()
        self._operators.__enter__()
        self._plain = CpuPlatform.synchronize
        CpuPlatform.synchronize = lambda _: self.note()  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: Any) -> None:
        CpuPlatform.synchronize = self._plain  # type: ignore[method-assign]
        self._operators.__exit__(*error)
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in METHODS and isinstance(args[0], torch.Tensor):
            self.note()
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _waits(func, args):
            self._waits.note()
        return func(*args, **(kwargs or {}))


def _waits(func: Any, args: Any) -> bool:
    name = func.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_"):  # by a mask: how many are true?
        is_fill = name != "index" and args[2].numel() == 1  # torch then fills under the mask
        masks = (x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8))
        return not is_fill and any(True for _ in masks)
    return name in WAITS


def asker() -> str:
    """``file:function`` of the innermost frame of ours or of megatron-core."""
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        file = frame.f_code.co_filename
        if file.startswith(str(HOME)):
            return f"{Path(file).relative_to(HOME).as_posix()}:{frame.f_code.co_name}"
        if THEIRS in file:
            return f"{THEIRS}{file.rpartition(THEIRS)[2]}:{frame.f_code.co_name}"
    return "elsewhere"
