"""CUDA: NCCL between ranks; megatron-core runs as it is."""

import logging
import os
from typing import Literal

from megatron_asvr.platforms import apex
from megatron_asvr.platforms import deterministic as switches
from megatron_asvr.platforms.peaks import link_gb_s, peak_flops

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class CudaPlatform:
    """See ``base.Platform``."""

    name: Literal["cuda"] = "cuda"
    backend: Literal["nccl"] = "nccl"
    supports_fork = False

    @property
    def device(self) -> torch.device:
        """The CUDA device that ``set_device`` chose."""
        return torch.device("cuda", torch.cuda.current_device())

    @property
    def num_gpus(self) -> int:
        """As torch counts them."""
        return torch.cuda.device_count()

    @property
    def compute_capability(self) -> tuple[int, int]:
        """Of the device that ``set_device`` chose."""
        return torch.cuda.get_device_capability()

    @property
    def cuda_version(self) -> tuple[int, int]:
        """As torch tells it."""
        major, minor = torch.version.cuda.split(".")[:2]
        return int(major), int(minor)

    def prepare(self) -> None:
        """Keep a package that is not NVIDIA's apex away from megatron-core; nothing else.

        ``CUDA_DEVICE_MAX_CONNECTIONS=1`` is what megatron-core asks for under tensor or sequence
        parallelism, so that a collective queued before a matrix product also starts before it.
        """
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        usable, reason = apex.detect()
        logger.info("apex: %s", reason)
        if not usable:
            apex.block()

    def after_import(self) -> None:
        """Nothing: megatron-core is used as it is."""

    def per_rank(self, threads: int = 1, *, deterministic: bool = False) -> None:
        """Set the CPU threads of this rank."""
        if deterministic:
            switches.switch_on()
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)

    def set_device(self, local_rank: int) -> None:
        """Bind this thread to one GPU of the node."""
        torch.cuda.set_device(local_rank % torch.cuda.device_count())

    @property
    def group_device(self) -> torch.device:
        """The device that ``set_device`` chose."""
        return self.device

    def stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """The one that torch uses in this thread (all threads share the default one)."""
        return torch.cuda.current_stream(device) if device.type == "cuda" else None

    def bring(self, x: Tensor) -> Tensor:
        """Through pinned memory, which torch keeps until the copy is done."""
        return x if x.is_cuda else x.pin_memory().to(self.device, non_blocking=True)

    def synchronize(self) -> None:
        """Return when this GPU has nothing left to do."""
        torch.cuda.synchronize()

    def mark(self) -> torch.cuda.Event:
        """An event behind what the current stream holds so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """By the device's clock."""
        return start.elapsed_time(end) / 1e3

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Of a GPU that ``peaks.py`` knows."""
        return peak_flops(torch.cuda.get_device_name(), dtype)

    def link_gb_s(self) -> float | None:
        """Of a GPU that ``peaks.py`` knows."""
        return link_gb_s(torch.cuda.get_device_name())

    def release_memory(self) -> None:
        """Of torch's allocator."""
        torch.cuda.empty_cache()

    def peak_memory_bytes(self) -> int:
        """Highest memory that torch's allocator reserved on this GPU."""
        return torch.cuda.max_memory_reserved()
