"""What megatron-core needs to be imported and to run without a GPU.

Nothing of megatron-core is edited. Each shim redirects a CUDA device to the CPU, stands in for a
concept that exists on CUDA only (streams, events), or replaces one function. They are installed by
the CPU platform and by nothing else. ``SHIMS``, at the end, lists them with lines that need them
(a few of many; a test compares them with the installed version).

A shim of stage ``before`` works on torch and is installed before the first import of megatron, one
of stage ``after`` replaces attributes of imported modules.
"""

import sys
from collections.abc import Callable
from typing import Literal, NamedTuple

from megatron_asvr.platforms import redirects, replacements

from megatron_asvr.errors import ConfigError


class Line(NamedTuple):
    """A line of megatron-core: its number in 0.16.1 and 0.19.2 (None: not there), part of it."""

    file: str  # relative to megatron/core
    line_0_16: int | None
    line_0_19: int
    code: str


class Shim(NamedTuple):
    """One shim: its name, when it is installed, how, and the lines that need it."""

    name: str
    stage: Literal["before", "after"]
    install: Callable[[], None]
    needed_by: tuple[Line, ...]


SHIMS = (
    Shim(
        "no_compiler", "before", redirects.no_compiler, (Line("jit.py", 21, 21, "torch.compile"),)
    ),
    Shim(
        "no_triton",
        "before",
        redirects.no_triton,
        (Line("transformer/moe/ops/paged_stash.py", None, 4, "import triton"),),
    ),
    Shim(
        "current_device",
        "before",
        redirects.current_device,
        (Line("distributed/param_and_grad_buffer.py", 783, 1162, "torch.cuda.current_device()"),),
    ),
    Shim(
        "factories",
        "before",
        redirects.factories,
        (
            Line("pipeline_parallel/schedules.py", 596, 749, 'device="cuda"'),
            Line("optimizer/optimizer.py", 907, 1249, "device='cuda'"),
            Line("models/common/embeddings/rope_utils.py", 63, 63, "pin_memory=True"),
        ),
    ),
    Shim(
        "moves",
        "before",
        redirects.moves,
        (
            Line("models/common/embeddings/rope_utils.py", 64, 64, ".cuda("),
            Line("optimizer/grad_scaler.py", 140, 163, ".cuda("),
        ),
    ),
    Shim(
        "streams",
        "before",
        redirects.streams,
        (Line("distributed/distributed_data_parallel.py", 230, 297, "torch.cuda.Stream("),),
    ),
    Shim(
        "generator",
        "before",
        redirects.generator,
        (Line("tensor_parallel/random.py", 235, 303, "torch.cuda.get_rng_state()"),),
    ),
    Shim(
        "type_names",
        "before",
        redirects.type_names,
        (
            Line("optimizer/optimizer.py", 671, 1009, "torch.cuda.BFloat16Tensor"),
            Line("optimizer/clip_grads.py", 167, 174, "torch.cuda.FloatTensor"),
        ),
    ),
    Shim(
        "tracker_state",
        "after",
        replacements.tracker_state,
        (Line("tensor_parallel/random.py", 111, 174, "_lazy_call(cb)"),),
    ),
    Shim(
        "recompute",
        "after",
        replacements.recompute,
        (
            Line("tensor_parallel/random.py", 589, 693, "FP8GlobalStateManager"),
            Line("tensor_parallel/random.py", 636, 740, "self.fp8 = fp8 is not None"),
        ),
    ),
    Shim(
        "split_sizes",
        "after",
        replacements.split_sizes,
        (
            Line("transformer/moe/moe_utils.py", 1093, 1184, "tensor.is_cuda"),
            Line("transformer/moe/token_dispatcher.py", 880, 931, "as_numpy=True"),
        ),
    ),
    Shim(
        "fused_adam",
        "after",
        replacements.fused_adam,
        (Line("optimizer/distrib_optimizer.py", 641, 838, '["step"].item()'),),
    ),
)

SAVINGS = (replacements.lone_collectives, replacements.in_place_updates)
"""What saves time only: without it everything works."""

_installed: set[str] = set()


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
    """Install the shims of stage ``after``, and what saves time only; idempotent."""
    _install("after")
    for install in SAVINGS:
        if install.__name__ not in _installed:
            install()
            _installed.add(install.__name__)


def _install(stage: str) -> None:
    for shim in SHIMS:
        if shim.stage == stage and shim.name not in _installed:
            shim.install()
            _installed.add(shim.name)
