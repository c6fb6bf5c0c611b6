"""CUDA: NCCL between ranks; megatron-core runs as it is."""

import importlib.util
import logging
import os
from typing import Literal

from megatron_asvr.platforms import apex
from megatron_asvr.platforms.base import Capabilities

import torch

logger = logging.getLogger(__name__)

FP8_COMPUTE_CAPABILITY = (8, 9)  # Ada and Hopper are the first with FP8 matrix units


class CudaPlatform:
    """See ``base.Platform``."""

    name: Literal["cuda"] = "cuda"
    backend: Literal["nccl"] = "nccl"

    @property
    def device(self) -> torch.device:
        """The CUDA device that ``set_device`` chose."""
        return torch.device("cuda", torch.cuda.current_device())

    @property
    def capabilities(self) -> Capabilities:
        """What this GPU and the installed libraries can do."""
        te = importlib.util.find_spec("transformer_engine") is not None
        fp8 = te and torch.cuda.get_device_capability() >= FP8_COMPUTE_CAPABILITY
        attention: Literal["te", "dense"] = "te" if te else "dense"
        return Capabilities(supports_fp8=fp8, attention=attention, supports_fork=False)

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

    def per_rank(self, threads: int = 1) -> None:
        """Set the CPU threads of this rank."""
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)

    def set_device(self, local_rank: int) -> None:
        """Bind this process to one GPU of the node."""
        torch.cuda.set_device(local_rank % torch.cuda.device_count())

    def synchronize(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize()

    def peak_memory_bytes(self) -> int:
        """Highest memory that torch's allocator reserved on this GPU."""
        return torch.cuda.max_memory_reserved()

    def rng_state(self) -> dict[str, torch.Tensor]:
        """States of the CPU's and this GPU's generators."""
        return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state()}

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what ``rng_state`` returned."""
        torch.set_rng_state(state["cpu"])
        torch.cuda.set_rng_state(state["cuda"])
