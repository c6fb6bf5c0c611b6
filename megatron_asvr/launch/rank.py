"""A rank's place in its job, its device and its process group."""

import contextlib
import datetime
import os
from dataclasses import dataclass

from megatron_asvr.platforms import select

import torch.distributed as dist

from megatron_asvr.errors import LaunchError
from megatron_asvr.parallel.collectives import barrier

DEFAULT_TIMEOUT_S = 600.0

# Who started this process: the variables that hold rank, world size and rank on the node.
_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a process stands in its job.

    Attributes:
        launcher: who started it.
        rank: its number in the world.
        world_size: number of ranks.
        local_rank: its number on this node.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int


def place() -> Place | None:
    """This process's place in a launched job, or None when no launcher started it.

    Slurm's variables count only inside a job step (``srun``), not in the batch script.
    """
    for launcher, *names in _LAUNCHERS:
        values = [os.environ.get(name) for name in names]
        if launcher == "Slurm" and "SLURM_STEP_ID" not in os.environ:
            continue
        if values[0] is not None and values[1] is not None:
            rank, world_size, local_rank = (int(value or 0) for value in values)
            return Place(launcher=launcher, rank=rank, world_size=world_size, local_rank=local_rank)
    return None


def prepare_rank(local_rank: int, threads_per_rank: int = 1) -> None:
    """Bind this process to its device and set its threads."""
    platform, _ = select()
    platform.per_rank(threads_per_rank)
    platform.set_device(local_rank)


def init_group(rank: int, world_size: int, *, init_method: str, timeout_s: float) -> None:
    """Initialise the default process group with the platform's backend."""
    platform, _ = select()
    dist.init_process_group(
        platform.backend,
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )


def leave_group() -> None:
    """Destroy the default process group, if there is one, when all its ranks are done with it.

    gloo's ranks connect one by one: one that leaves early breaks the connection that a slower one
    is just making.
    """
    if not dist.is_initialized():
        return
    if dist.get_backend() == "gloo":
        with contextlib.suppress(RuntimeError):  # a rank that failed says so itself
            barrier(group=dist.group.WORLD)
    dist.destroy_process_group()


def init_rank(threads_per_rank: int = 1, timeout_s: float = DEFAULT_TIMEOUT_S) -> Place:
    """This rank's place, after joining the process group of a job that a launcher started.

    Args:
        threads_per_rank: CPU threads of this rank.
        timeout_s: how long a collective may wait for the other ranks.

    Raises:
        LaunchError: no launcher's variables are set, or not where the ranks meet.
    """
    here = place()
    if here is None:
        raise LaunchError(
            "this process is no rank of a job: neither RANK and WORLD_SIZE (torchrun) nor "
            "SLURM_PROCID and SLURM_NTASKS (srun) are set; use `asvr` or torchrun"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and here.world_size > 1:
        raise LaunchError(
            f"{here.launcher} started rank {here.rank} of {here.world_size}, but "
            f"{' and '.join(missing)} is not set; export the first node's name and a free port"
        )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    prepare_rank(here.local_rank, threads_per_rank)
    init_group(here.rank, here.world_size, init_method="env://", timeout_s=timeout_s)
    return here
