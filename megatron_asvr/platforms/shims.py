"""What megatron-core needs to be imported and to run without a GPU.

Nothing of megatron-core is edited. Each shim redirects a CUDA device to the CPU, stands in for a
concept that exists on CUDA only (streams, events), or replaces one function. They are installed by
the CPU platform and by nothing else. ``SHIMS``, at the end, lists them with lines that need them
(a few of many; a test compares them with the installed version).

A shim of stage ``before`` works on torch and is installed before the first import of megatron, one
of stage ``after`` replaces attributes of imported modules, one of stage ``rank`` runs in each rank
(which may be forked from a process where the other stages ran already).
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import logging
import multiprocessing
import multiprocessing.managers
import os
import signal
import sys
import types
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from megatron_asvr.platforms.adam import FusedAdam
from megatron_asvr.platforms.null import NullEvent, NullStream

import torch
from torch.utils._device import _device_constructors

from megatron_asvr.errors import ConfigError

used: Counter[str] = Counter()  # how often each redirect was taken, by the name of the shim
_installed: set[str] = set()


class Line(NamedTuple):
    """A line of megatron-core: its number in 0.16.1 and 0.19.2 (None: not there), part of it."""

    file: str  # relative to megatron/core
    line_0_16: int | None
    line_0_19: int
    code: str


class Shim(NamedTuple):
    """One shim: its name, when it is installed, how, and the lines that need it."""

    name: str
    stage: Literal["before", "after", "rank"]
    install: Callable[[], None]
    needed_by: tuple[Line, ...]


def install_before_import() -> None:
    """Install the shims of stage ``before``; idempotent.

    Raises:
        ConfigError: megatron-core is imported already.
    """
    if "megatron.core" in sys.modules and not _installed:
        raise ConfigError(
            "megatron.core was imported before this process was prepared for a machine without a "
            "GPU; import megatron_asvr.platforms.mcore first"
        )
    _install("before")


def install_after_import() -> None:
    """Install the shims of stage ``after``; idempotent."""
    _install("after")


def install_per_rank() -> None:
    """Install the shims of stage ``rank``; idempotent."""
    _install("rank")


def _install(stage: str) -> None:
    for shim in SHIMS:
        if shim.stage == stage and shim.name not in _installed:
            shim.install()
            _installed.add(shim.name)


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _no_compiler() -> None:
    """``torch.compile`` becomes the identity: megatron-core decorates its fused operators with it.

    Otherwise the first call of each on each rank would start a C++ compiler.
    """
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch._dynamo.config.disable = True


def _no_triton() -> None:
    """A module that 0.19.2 imports without asking gets empty kernels, where triton is missing."""
    if importlib.util.find_spec("triton") is not None:
        return
    module = types.ModuleType("megatron.core.transformer.moe.ops.paged_stash")
    module.GLOBAL_BLOCK_SIZE = 1024
    module.paged_stash_copy_kernel = None
    module.paged_stash_pop_kernel = None
    sys.modules[module.__name__] = module


def _current_device() -> None:
    """``torch.cuda.current_device()`` is passed on as ``device=``: it returns the CPU."""

    def current_device() -> str:
        used["current_device"] += 1
        return "cpu"

    def set_device(device: object) -> None:
        """Nothing to bind."""

    torch.cuda.current_device = current_device
    torch.cuda.set_device = set_device


_FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn"),
    *("randint", "zeros_like", "ones_like", "empty_like", "full_like"),
)


def _factories() -> None:
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

    for name in _FACTORIES:
        setattr(torch, name, redirect(getattr(torch, name)))


def _moves() -> None:
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


def _streams() -> None:
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


def _generator() -> None:
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


def _type_names() -> None:
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


def _tracker_state() -> None:
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


def _recompute() -> None:
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


def _fused_adam() -> None:
    """The optimizer is our ``FusedAdam``, with the state layout of the GPU's.

    With torch's AdamW, whose step is a tensor per parameter, the state of a distributed optimizer
    cannot be loaded back.
    """
    optimizer = importlib.import_module("megatron.core.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    optimizer.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.Adam = FusedAdam
    distributed.HAVE_APEX_OR_TE = True
    distributed.USING_APEX_OPTIMIZER = True


def _results_queue() -> None:
    """The checkpoint writer's queue comes from a forked process; its own spawns an interpreter.

    A spawned one imports torch and megatron-core again on every rank, at each first save, and
    without these shims. Forking here is safe: a rank has no threads yet. The process dies with its
    rank, however that ends.
    """
    writer = importlib.import_module("megatron.core.dist_checkpointing.strategies.filesystem_async")
    if writer._results_queue is None:
        manager = multiprocessing.managers.SyncManager(ctx=multiprocessing.get_context("fork"))
        manager.start(initializer=die_with_parent)
        writer._results_queue = manager.Queue()
        _keep_alive.append(manager)


_keep_alive: list[object] = []
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to SIGKILL this process when the thread that started it ends (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


SHIMS = (
    Shim("no_compiler", "before", _no_compiler, (Line("jit.py", 21, 21, "torch.compile"),)),
    Shim(
        "no_triton",
        "before",
        _no_triton,
        (Line("transformer/moe/ops/paged_stash.py", None, 4, "import triton"),),
    ),
    Shim(
        "current_device",
        "before",
        _current_device,
        (Line("distributed/param_and_grad_buffer.py", 783, 1162, "torch.cuda.current_device()"),),
    ),
    Shim(
        "factories",
        "before",
        _factories,
        (
            Line("pipeline_parallel/schedules.py", 596, 749, 'device="cuda"'),
            Line("optimizer/optimizer.py", 907, 1249, "device='cuda'"),
            Line("models/common/embeddings/rope_utils.py", 63, 63, "pin_memory=True"),
        ),
    ),
    Shim(
        "moves",
        "before",
        _moves,
        (
            Line("models/common/embeddings/rope_utils.py", 64, 64, ".cuda("),
            Line("optimizer/grad_scaler.py", 140, 163, ".cuda("),
        ),
    ),
    Shim(
        "streams",
        "before",
        _streams,
        (Line("distributed/distributed_data_parallel.py", 230, 297, "torch.cuda.Stream("),),
    ),
    Shim(
        "generator",
        "before",
        _generator,
        (Line("tensor_parallel/random.py", 235, 303, "torch.cuda.get_rng_state()"),),
    ),
    Shim(
        "type_names",
        "before",
        _type_names,
        (
            Line("optimizer/optimizer.py", 671, 1009, "torch.cuda.BFloat16Tensor"),
            Line("optimizer/clip_grads.py", 167, 174, "torch.cuda.FloatTensor"),
        ),
    ),
    Shim(
        "tracker_state",
        "after",
        _tracker_state,
        (Line("tensor_parallel/random.py", 111, 174, "_lazy_call(cb)"),),
    ),
    Shim(
        "recompute",
        "after",
        _recompute,
        (
            Line("tensor_parallel/random.py", 589, 693, "FP8GlobalStateManager"),
            Line("tensor_parallel/random.py", 636, 740, "self.fp8 = fp8 is not None"),
        ),
    ),
    Shim(
        "fused_adam",
        "after",
        _fused_adam,
        (Line("optimizer/distrib_optimizer.py", 641, 838, '["step"].item()'),),
    ),
    Shim(
        "results_queue",
        "rank",
        _results_queue,
        (Line("dist_checkpointing/strategies/filesystem_async.py", 55, 65, "Manager().Queue()"),),
    ),
)
