"""The CPU: gloo between ranks, and megatron-core behind the shims of ``shims.py``."""

import ctypes
import importlib
import logging
import os
import time
import warnings
from typing import Literal

from megatron_asvr.platforms import apex, shims
from megatron_asvr.platforms import deterministic as switches

import torch
from torch import Tensor

from megatron_asvr.errors import ConfigError

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_KEPT = 2**25  # bytes, the most that glibc accepts


class CpuPlatform:
    """See ``base.Platform``."""

    name: Literal["cpu"] = "cpu"
    backend: Literal["gloo"] = "gloo"
    device = torch.device("cpu")
    supports_fork = True
    num_gpus = 0
    group_device: torch.device | None = None  # gloo refuses one
    compute_capability: tuple[int, int] | None = None
    cuda_version: tuple[int, int] | None = None

    def __init__(self, *, hide_cuda: bool = False) -> None:
        self._hide_cuda = hide_cuda

    def prepare(self) -> None:
        """Install the shims that megatron-core needs to be imported and to run without CUDA.

        Raises:
            ConfigError: the CPU is forced, but this process has used CUDA already.
        """
        if self._hide_cuda:
            if torch.cuda.is_initialized():
                raise ConfigError(
                    "ASVR_PLATFORM=cpu was set after this process had used CUDA; set it earlier"
                )
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        apex.block()  # even NVIDIA's: its kernels need a GPU
        # megatron-core warns, module by module, of fallbacks; on the CPU they are meant. The advice
        # about CUDA_DEVICE_MAX_CONNECTIONS is for overlapping kernels.
        for text in (
            r".*Apex (is|are) not installed",
            r"absl\.logging is not installed",
            ".*environment variable CUDA_DEVICE_MAX_CONNECTIONS",
        ):
            warnings.filterwarnings("ignore", text, module=r"megatron\.core")
        shims.install_before_import()

    def after_import(self) -> None:
        """Install the shims that replace attributes of imported megatron-core modules."""
        shims.install_after_import()

    def per_rank(self, threads: int = 1, *, deterministic: bool = False) -> None:
        """Set threads, denormals and what malloc keeps.

        Denormals are flushed because peaked logits would otherwise double the time of a step. The
        setting belongs to a thread, and threads inherit it: it comes before there are any.
        """
        if deterministic:
            switches.switch_on()
        torch.set_flush_denormal(True)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
        keep_memory()
        importlib.import_module("megatron_asvr.platforms.mcore")  # prepares, where nobody has

    def set_device(self, local_rank: int) -> None:
        """Nothing: all ranks of a node share its CPU."""

    def stream(self, device: torch.device) -> None:
        """None: operators run one after another."""

    def bring(self, x: Tensor) -> Tensor:
        """The tensor itself."""
        return x

    def synchronize(self) -> None:
        """Nothing: every operator has finished when it returns."""

    def mark(self) -> float:
        """The clock."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """By the clock."""
        return end - start

    def peak_flops(self, dtype: torch.dtype) -> None:
        """None: no data sheet says what a core gets of its CPU; benchmarks measure it."""

    def link_gb_s(self) -> None:
        """None: ranks of one machine share its memory."""

    def release_memory(self) -> None:
        """Of glibc; other C libraries keep what they like."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    def peak_memory_bytes(self) -> int:
        """Highest resident set of this process so far."""
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return 0


def keep_memory() -> bool:
    """Let this process keep what it freed; False where the C library knows no such setting.

    glibc gives large pieces back to the system, and every step then faults the same pages in
    again: a sixth of its time (docs/performance.md). Pieces above ``LARGEST_KEPT`` still go back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        logger.info("the C library has no mallopt: freed memory goes back to the system")
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
