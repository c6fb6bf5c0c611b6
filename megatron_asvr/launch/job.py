"""Run a function in every rank: of the job this process belongs to, or of one started here."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_asvr.errors import LaunchError
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.launch.rank import init_rank, leave_group, place

__all__ = ["init_rank", "leave_group", "place", "run"]


def run(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    world_size: int = 1,
    *,
    log_dir: str | os.PathLike[str] | None = None,
    threads_per_rank: int = 1,
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
        )
    if here.world_size != world_size:
        raise LaunchError(
            f"{here.launcher} started {here.world_size} ranks, the settings want {world_size}; "
            "change one of them"
        )
    if dist.is_initialized():
        return fn(*args)
    init_rank(threads_per_rank)
    result = fn(*args)
    leave_group()
    return result
