"""What the rest of the package may ask of a device."""

from typing import Any, Literal, Protocol

import torch
from torch import Tensor


class Platform(Protocol):
    """One kind of device.

    The order of the calls in a rank is: ``prepare`` (before the first megatron import),
    ``after_import`` (after it; both are made by ``platforms.mcore``), ``per_rank``, ``set_device``.
    A process from which ranks are forked makes the first two, each rank the others.
    """

    name: Literal["cuda", "cpu"]
    backend: Literal["nccl", "gloo"]
    supports_fork: bool  # ranks may be forked from a process that has imported everything

    @property
    def device(self) -> torch.device:
        """The device that tensors of this rank live on."""

    @property
    def num_gpus(self) -> int:
        """CUDA devices that this process sees; 0 on the CPU."""

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """What the device's tensor cores can do, e.g. (9, 0) for Hopper; None without CUDA."""

    @property
    def cuda_version(self) -> tuple[int, int] | None:
        """The CUDA that torch was built with, e.g. (12, 9); None without CUDA."""

    def prepare(self) -> None:
        """Make ``import megatron.core`` possible; idempotent."""

    def after_import(self) -> None:
        """Adjust modules of megatron-core that are now imported; idempotent."""

    def per_rank(self, threads: int = 1, *, deterministic: bool = False) -> None:
        """Settings of one rank's process, before its process group exists.

        Args:
            threads: CPU threads of this rank (part of a run's identity: it changes rounding).
            deterministic: also set the switches of ``deterministic.py``.
        """

    def set_device(self, local_rank: int) -> None:
        """Bind this thread, and on the first call the process, to a device of the node.

        Args:
            local_rank: of this rank on its node, or the index of its device.
        """

    @property
    def group_device(self) -> torch.device | None:
        """What ``init_process_group`` is to bind a rank to; None where a backend knows no device.

        NCCL otherwise guesses it from a rank's number, wrongly where ranks are placed otherwise.
        """

    def stream(self, device: torch.device) -> object | None:
        """In whose order this thread's work on a device is done; None where there is only one."""

    def bring(self, x: Tensor) -> Tensor:
        """The tensor on this rank's device, in the order of its work; itself if it is there.

        The host does not wait: what is copied lies in pinned memory until the copy is done.
        """

    def synchronize(self) -> None:
        """Return when the device has done all that was asked of it."""

    def mark(self) -> Any:
        """This moment in the device's work, for ``seconds``."""

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks, when the device has passed both."""

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Operations per second of dense products, by the data sheet; None where there is none."""

    def link_gb_s(self) -> float | None:
        """GB/s to the node's other devices, by the data sheet; None where there is none."""

    def release_memory(self) -> None:
        """Give back what was freed and is kept for later; for once, before training begins."""

    def peak_memory_bytes(self) -> int:
        """Highest memory use so far: of the device, or of this process on the CPU."""
