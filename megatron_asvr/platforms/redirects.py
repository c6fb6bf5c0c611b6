"""Shims that change torch: what is asked of CUDA is done on the CPU. ``shims.SHIMS`` lists them.

``used`` counts how often each was needed.
"""

import functools
import importlib.util
import os
import sys
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

from megatron_asvr.platforms.null import NullEvent, NullStream

import torch
from torch.utils._device import _device_constructors

used: Counter[str] = Counter()


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def no_compiler() -> None:
    """``torch.compile`` becomes the identity: megatron-core decorates its fused operators with it.

    Otherwise the first call of each on each rank would start a C++ compiler.
    """
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch._dynamo.config.disable = True


def no_triton() -> None:
    """A module that 0.19.2 imports without asking gets empty kernels, where triton is missing."""
    if importlib.util.find_spec("triton") is not None:
        return
    module = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
    module.GLOBAL_BLOCK_SIZE = 1024
    module.paged_stash_copy_kernel = None
    module.paged_stash_pop_kernel = None
    sys.modules[module.__name__] = module


def current_device() -> None:
    """``torch.cuda.current_device()`` is passed on as ``device=``: it returns the CPU."""

    def current_device() -> str:
        used["current_device"] += 1
        return "cpu"

    def set_device(device: object) -> None:
        """Nothing to bind."""

    torch.cuda.current_device = current_device
    torch.cuda.set_device = set_device


FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn"),
    *("randint", "zeros_like", "ones_like", "empty_like", "full_like"),
)


def factories() -> None:
    """``device="cuda"`` of tensor factories is the CPU, ``pin_memory=True`` is dropped."""
    # torch remembers its factories at the first use of a device context. Remembering them now keeps
    # ``with torch.device("meta")`` (how transformers builds models) working on the originals.
    _device_constructors()

    def redirect(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def factory(*args: Any, **kwargs: Any) -> Any:
            if kwargs:
                if _is_cuda(kwargs.get("device")):
                    used["factories"] += 1
                    kwargs["device"] = "cpu"
                if kwargs.get("pin_memory"):
                    used["factories"] += 1
                    kwargs["pin_memory"] = False
            return original(*args, **kwargs)

        return factory

    for name in FACTORIES:
        setattr(torch, name, redirect(getattr(torch, name)))


def moves() -> None:
    """``x.cuda()`` returns x, ``x.to("cuda")`` goes to the CPU."""

    def cuda(self: Any, *args: Any, **kwargs: Any) -> Any:
        used["moves"] += 1
        return self

    original = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and isinstance(args[0], str | torch.device) and _is_cuda(args[0]):
            used["moves"] += 1
            args = ("cpu", *args[1:])
        if kwargs and _is_cuda(kwargs.get("device")):
            used["moves"] += 1
            kwargs["device"] = "cpu"
        return original(self, *args, **kwargs)

    torch.Tensor.cuda = cuda
    torch.nn.Module.cuda = cuda
    torch.Tensor.to = to


def streams() -> None:
    """Streams and events do nothing: CPU operators have finished when they return."""
    current = NullStream()

    def current_stream(*args: object, **kwargs: object) -> NullStream:
        used["streams"] += 1
        return current

    def stream(stream: NullStream | None = None) -> NullStream:
        used["streams"] += 1
        return stream or current

    def nothing(*args: object, **kwargs: object) -> None:
        used["streams"] += 1

    torch.cuda.current_stream = current_stream
    torch.cuda.default_stream = current_stream
    torch.cuda.stream = stream
    torch.cuda.Stream = NullStream
    torch.cuda.Event = NullEvent
    torch.cuda.synchronize = nothing
    torch.cuda.nvtx.range_push = nothing
    torch.cuda.nvtx.range_pop = nothing
    torch.Tensor.record_stream = nothing


def generator() -> None:
    """The generator of the CUDA device is torch's CPU generator."""

    def get_rng_state(*args: object, **kwargs: object) -> torch.Tensor:
        used["generator"] += 1
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *args: object, **kwargs: object) -> None:
        used["generator"] += 1
        torch.set_rng_state(state)

    def manual_seed(seed: int) -> None:
        used["generator"] += 1
        torch.default_generator.manual_seed(int(seed))

    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = get_rng_state
        module.set_rng_state = set_rng_state
        module.manual_seed = manual_seed
        module.manual_seed_all = manual_seed


def type_names() -> None:
    """megatron-core, and nobody else, reads ``torch.cuda.FloatTensor`` as the type of a tensor."""
    original = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = original(self, *args, **kwargs)
        if isinstance(name, str) and name.startswith("torch.") and "cuda" not in name:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("megatron.core"):
                used["type_names"] += 1
                return name.replace("torch.", "torch.cuda.", 1)
        return name

    torch.Tensor.type = type_
