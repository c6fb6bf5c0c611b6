"""Shims that replace attributes of imported megatron-core modules. ``shims.SHIMS`` lists them."""

import contextlib
import ctypes
import functools
import importlib
import logging
import signal
from collections.abc import Callable
from typing import Any

from megatron_asvr.platforms.adam import FusedAdam
from megatron_asvr.platforms.redirects import used

import numpy as np
import torch


def tracker_state() -> None:
    """The random-state tracker sets the CPU generator.

    Its own way puts the change off until CUDA is initialised, which is never: without an error, the
    states would neither be set nor restored. The tracker warns when the CPU generator moved inside
    its context; here it is meant to.
    """
    random = importlib.import_module("megatron.core.tensor_parallel.random")

    def set_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
        used["tracker_state"] += 1
        torch.set_rng_state(new_state)

    def meant_to_move(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.getMessage()

    random._set_cuda_rng_state = set_state
    logging.getLogger(random.__name__).addFilter(meant_to_move)


class _NoFp8:
    """The two questions that recomputation asks of Transformer Engine's FP8 state."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        used["recompute"] += 1
        return False

    @staticmethod
    def get_fp8_recipe() -> None:
        return None


def recompute() -> None:
    """Recomputing a norm works without Transformer Engine (not about CUDA: a slip in a test).

    ``CheckpointWithoutOutput`` takes ``fp8=False`` for "FP8 is on" (``fp8 is not None``) and asks a
    class that was never imported.
    """
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    if random.HAVE_TE:
        return

    def nothing(*args: object, **kwargs: object) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    random.FP8GlobalStateManager = _NoFp8
    random.activation_recompute_forward = nothing
    random.fp8_autocast = nothing


def split_sizes() -> None:
    """Experts' all-to-all gets its split sizes as numbers, which torch wants.

    megatron-core turns them into numbers only when it moves them from the GPU.
    """
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    original = dispatcher.maybe_move_tensor_to_cpu

    def to_cpu(
        tensor: torch.Tensor, as_numpy: bool = False, record_stream: bool = False
    ) -> torch.Tensor | np.ndarray:
        moved = original(tensor, as_numpy, record_stream)
        if as_numpy and isinstance(moved, torch.Tensor):
            used["split_sizes"] += 1
            return moved.numpy()
        return moved

    dispatcher.maybe_move_tensor_to_cpu = to_cpu


def fused_adam() -> None:
    """The optimizer is our ``FusedAdam``, with the state layout of the GPU's.

    With torch's AdamW, whose step is a tensor per parameter, the state of a distributed optimizer
    cannot be loaded back.
    """
    optimizers = importlib.import_module("megatron.core.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    optimizers.Adam = FusedAdam
    optimizers.USING_PYTORCH_OPTIMIZER = False
    distributed.Adam = FusedAdam
    distributed.HAVE_APEX_OR_TE = True
    distributed.USING_APEX_OPTIMIZER = True


def lone_collectives() -> None:
    """A data-parallel group of one rank sums its gradients and gathers its weights in place.

    gloo would copy all of them there and back, for nothing. No shim: without it everything works,
    with two more copies of the gradients and a tenth more time a step (docs/performance.md).
    """
    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(buffers, name, _unless_alone(getattr(buffers, name)))


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The collective, but nothing where one rank gives and takes the same memory."""

    @functools.wraps(collective)
    def called(output: torch.Tensor, given: torch.Tensor, **settings: Any) -> Any:
        if settings["group"].size() == 1 and output.data_ptr() == given.data_ptr():
            return None
        return collective(output, given, **settings)

    return called


def in_place_updates() -> None:
    """Gradients are clipped where they are, and weights that are their own masters not copied.

    megatron-core's stand-in for apex multiplies into new memory and copies back, and its optimizer
    copies every fp32 weight over itself. No shim either; docs/performance.md has the cost.
    """
    clip_grads = importlib.import_module("megatron.core.optimizer.clip_grads")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    clip_grads.multi_tensor_scale_impl = _scale
    optimizer = distributed.DistributedOptimizer
    copy = optimizer._copy_main_params_to_model_params

    @functools.wraps(copy)
    def copied(self: Any) -> None:
        if self.is_stub_optimizer or not _are_masters(self):
            copy(self)

    optimizer._copy_main_params_to_model_params = copied


def _scale(
    chunk_size: int, noop_flag: torch.Tensor, lists: list[list[torch.Tensor]], scale: float
) -> None:
    """``multi_tensor_scale`` of apex where both lists are the same tensors."""
    given, results = lists
    assert all(a is b for a, b in zip(given, results, strict=True))
    torch._foreach_mul_(results, scale)


def _are_masters(optimizer: Any) -> bool:
    """Whether all that a distributed optimizer updates are views of the model's own weights."""
    if any(optimizer.shard_fp32_from_float16_groups):
        return False
    pairs = zip(optimizer.shard_fp32_groups, optimizer.model_fp32_groups, strict=True)
    return all(
        shard.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
        for shards, weights in pairs
        for shard, weight in zip(shards, weights, strict=True)
    )


_PR_SET_PDEATHSIG = 1


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send this process a signal when the thread that started it ends (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
