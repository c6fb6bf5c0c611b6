"""Ranks that ``mpiexec`` started: their place and their meeting point."""

import os
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_asvr.errors import LaunchError

# Rank, world size and rank on the node. Hydra is MPICH's and Intel's; under Slurm it starts its
# ranks itself, and Slurm's own variables are then those of a node. `srun --mpi=pmi2` sets PMI_RANK
# too, but not the third.
LAUNCHERS = (
    ("MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
_NODE_SIZES = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def world(world_size: int) -> Any:
    """mpi4py's communicator of all ranks.

    Args:
        world_size: what mpiexec says.

    Raises:
        LaunchError: mpi4py is missing, or belongs to another MPI than mpiexec.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"processes of mpiexec need mpi4py ({error}); pip install 'megatron_asvr[mpi]'"
        ) from error
    if world_size != MPI.COMM_WORLD.size:
        library = MPI.Get_library_version().partition("\n")[0]
        raise LaunchError(
            f"mpiexec started {world_size} ranks, but mpi4py sees {MPI.COMM_WORLD.size}: mpiexec "
            f"and mpi4py's library ({library}) are of different MPIs; use the mpiexec of that one"
        )
    return MPI.COMM_WORLD


def store(world_size: int, timeout_s: float) -> dist.Store:
    """Where the ranks meet: a store of rank 0, on a port that is free there. All ranks call it."""
    everyone = world(world_size)
    limit = timedelta(seconds=timeout_s)
    made, where = None, None
    if everyone.rank == 0:
        alone = any(os.environ.get(name) == str(world_size) for name in _NODE_SIZES)
        host = "127.0.0.1" if alone else socket.getfqdn()
        made = dist.TCPStore(host, 0, None, True, limit, wait_for_workers=False)
        where = (host, made.port)
    host, port = everyone.bcast(where)
    return made or dist.TCPStore(host, port, None, False, limit)
