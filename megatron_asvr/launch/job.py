"""Run a function in every rank: of the job this process belongs to, or of one started here."""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_asvr.errors import LaunchError
from megatron_asvr.launch import mpi
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.launch.rank import init_rank, leave_group, place

__all__ = ["after_first", "init_rank", "leave_group", "part", "place", "run"]

# For rank 0 to come to the same error, and for the launcher to end the others then. Start-up from
# slow storage sets ranks seconds apart, and srun takes two to notice an end.
FIRST_WORD_S = 20.0


def run(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    world_size: int = 1,
    *,
    log_dir: str | os.PathLike[str] | None = None,
    threads_per_rank: int = 1,
    deterministic: bool = False,
    timeout_s: float | None = None,
) -> Any:
    """What ``fn(*args)`` returns on rank 0, or on this rank when a launcher started it.

    Inside a launched job this process is one of its ranks: it joins the process group and calls the
    function. Otherwise ``world_size`` ranks are started on this machine.

    Args:
        fn: a function that can be pickled (defined at the top of a module).
        args: its arguments.
        world_size: ranks to start; a launched job must have as many.
        log_dir: folder of the ranks' logs, for ranks started here.
        threads_per_rank: CPU threads of each rank.
        deterministic: set the switches of ``platforms.deterministic`` in each rank.
        timeout_s: limit of the whole call, for ranks started here.

    Raises:
        LaunchError: a rank failed, or the launched job has another number of ranks.
    """
    here = place()
    if here is None:
        return run_ranks(
            fn,
            args,
            world_size,
            log_dir=log_dir,
            timeout_s=timeout_s,
            threads_per_rank=threads_per_rank,
            deterministic=deterministic,
        )
    if here.world_size != world_size:
        raise LaunchError(
            f"{here.launcher} started {here.world_size} ranks, the settings want {world_size}; "
            "change one of them"
        )
    if dist.is_initialized():
        return fn(*args)
    init_rank(threads_per_rank, deterministic=deterministic)
    result = fn(*args)
    leave_group()
    return result


def after_first() -> None:
    """Give rank 0 of a launched job time to fail first.

    Most errors come on every rank. The end of rank 0 makes the launcher end the others, so that
    they are shown once; an error that rank 0 does not have is shown a moment later.
    """
    here = place()
    if here is None:
        return
    if here.launcher == "MPI":
        with contextlib.suppress(LaunchError):
            mpi.world(here.world_size)  # mpi4py ends the others only where MPI is in use
    if here.rank > 0:
        time.sleep(FIRST_WORD_S)


def part() -> None:
    """Return when every rank has come here, where the first to leave would end the others.

    That is what ``python -m mpi4py`` does with a rank whose exit status is not 0.
    """
    here = place()
    if here is not None and here.launcher == "MPI":
        mpi.world(here.world_size).Barrier()
