"""The choice of the platform: automatic, or forced by ASVR_PLATFORM; or none, to plan."""

import contextlib
import functools
import os
from collections.abc import Iterator

from megatron_asvr.platforms.base import Platform
from megatron_asvr.platforms.cpu import CpuPlatform
from megatron_asvr.platforms.cuda import CudaPlatform

import torch

from megatron_asvr.errors import ConfigError

CHOICES = ("auto", "cpu", "cuda")


class _WithoutMemory(CpuPlatform):
    device = torch.device("meta")


_instead: list[tuple[Platform, str]] = []


def select() -> tuple[Platform, str]:
    """The platform of this process and the reason for it; decided once per process.

    Raises:
        ConfigError: ASVR_PLATFORM names no platform, or asks for CUDA where there is none.
    """
    return _instead[-1] if _instead else _selected()


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Inside, what is built has the shapes of the CPU's modules and no memory: it is for counting.

    Modules that take their device from ``select`` then stand on torch's meta device.
    """
    _instead.append((_WithoutMemory(), "shapes alone, without memory"))
    try:
        with torch.device("meta"):
            yield
    finally:
        _instead.pop()


@functools.cache
def _selected() -> tuple[Platform, str]:
    wanted = os.environ.get("ASVR_PLATFORM") or "auto"
    if wanted not in CHOICES:
        raise ConfigError(f"ASVR_PLATFORM={wanted!r} is unknown; use one of {', '.join(CHOICES)}")
    if wanted == "cpu":
        return CpuPlatform(hide_cuda=True), "forced by ASVR_PLATFORM=cpu"
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        why = "forced by ASVR_PLATFORM=cuda" if wanted == "cuda" else f"{count} CUDA device(s)"
        return CudaPlatform(), why
    why = "this build of torch has no CUDA" if torch.version.cuda is None else "no CUDA device"
    if wanted == "cuda":
        raise ConfigError(f"ASVR_PLATFORM=cuda, but {why}; use ASVR_PLATFORM=cpu or auto")
    return CpuPlatform(), why
