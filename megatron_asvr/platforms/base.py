"""What the rest of the package may ask of a device."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What a platform can do; ``precision/`` turns it into a choice of modules.

    Attributes:
        supports_fp8: the device multiplies FP8 matrices.
        attention: ``te`` where Transformer Engine can run, else ``dense`` (torch's SDPA).
        supports_fork: ranks may be forked from a process that has imported everything.
    """

    supports_fp8: bool
    attention: Literal["te", "dense"]
    supports_fork: bool


class Platform(Protocol):
    """One kind of device.

    The order of the calls in a rank is: ``prepare`` (before the first megatron import),
    ``after_import`` (after it; both are made by ``platforms.mcore``), ``per_rank``, ``set_device``.
    A process from which ranks are forked makes the first two, each rank the others.
    """

    name: Literal["cuda", "cpu"]
    backend: Literal["nccl", "gloo"]

    @property
    def device(self) -> torch.device:
        """The device that tensors of this rank live on."""

    @property
    def capabilities(self) -> Capabilities:
        """What the device can do."""

    def prepare(self) -> None:
        """Make ``import megatron.core`` possible; idempotent."""

    def after_import(self) -> None:
        """Adjust modules of megatron-core that are now imported; idempotent."""

    def per_rank(self, threads: int = 1) -> None:
        """Settings of one rank's process, before its process group exists.

        Args:
            threads: CPU threads of this rank (part of a run's identity: it changes rounding).
        """

    def set_device(self, local_rank: int) -> None:
        """Bind this process to the device of its rank on the node."""

    def synchronize(self) -> None:
        """Wait until the device has finished what was queued."""

    def peak_memory_bytes(self) -> int:
        """Highest memory use so far: of the device, or of this process on the CPU."""

    def rng_state(self) -> dict[str, torch.Tensor]:
        """State of the torch generators of this process."""

    def set_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what ``rng_state`` returned."""
