"""A rank's place in its job, its device and its process group."""

import contextlib
import datetime
import os
import socket
from dataclasses import dataclass

from megatron_asvr.platforms import select

import torch.distributed as dist

from megatron_asvr.errors import LaunchError
from megatron_asvr.launch import mpi
from megatron_asvr.parallel import flight
from megatron_asvr.parallel.collectives import barrier

DEFAULT_TIMEOUT_S = 600.0

# Who started this process: the variables that hold rank, world size and rank on the node.
_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    *mpi.LAUNCHERS,
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
        if launcher == "MPI" and values[2] is None:
            continue
        if values[0] is not None and values[1] is not None:
            rank, world_size, local_rank = (int(value or 0) for value in values)
            return Place(launcher=launcher, rank=rank, world_size=world_size, local_rank=local_rank)
    return None


def _require_node_order(here: Place) -> None:
    """Return when ranks are numbered node by node, as groups of neighbours are made.

    Raises:
        LaunchError: Slurm has distributed them in another way.
    """
    if here.launcher != "Slurm" or "SLURM_NODEID" not in os.environ:
        return
    node = int(os.environ["SLURM_NODEID"])
    per_node, rest = divmod(here.world_size, int(os.environ.get("SLURM_STEP_NUM_NODES", "1")))
    if not rest and here.rank != node * per_node + here.local_rank:
        raise LaunchError(
            f"Slurm made process {here.local_rank} of node {node} rank {here.rank}, wanted "
            f"{node * per_node + here.local_rank}: ranks that share a layer would be on different "
            "nodes; start them with srun --distribution=block"
        )


def prepare_rank(
    local_rank: int, threads_per_rank: int = 1, *, deterministic: bool = False
) -> None:
    """Bind this process to its device, after its threads and switches are set."""
    platform, _ = select()
    platform.per_rank(threads_per_rank, deterministic=deterministic)
    platform.set_device(local_rank)


def init_group(rank: int, world_size: int, *, store: dist.Store, timeout_s: float) -> None:
    """Initialise the default process group with the platform's backend."""
    platform, _ = select()
    flight.enable()
    dist.init_process_group(
        platform.backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=platform.group_device,
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


def open_store(here: Place, timeout_s: float) -> dist.Store:
    """Where the ranks of a launched job meet; the first one does not wait for the others.

    Args:
        here: this rank's place.
        timeout_s: how long to try to reach the first rank, and a later read may take.

    Raises:
        LaunchError: nothing tells where the ranks meet, or nobody answers there.
    """
    limit = datetime.timedelta(seconds=timeout_s)
    if here.launcher == "MPI" and "MASTER_ADDR" not in os.environ:
        return mpi.store(here.world_size, timeout_s)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and here.world_size > 1:
        raise LaunchError(
            f"{here.launcher} started rank {here.rank} of {here.world_size}, but "
            f"{' and '.join(missing)} is not set; export the first node's name and a free port"
        )
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = int(os.environ.get("MASTER_PORT", "0"))
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun itself
    try:
        store = dist.TCPStore(
            host,
            port,
            None,
            here.rank == 0 and not served,
            limit,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        said = str(error).partition("\n")[0]
        raise LaunchError(
            f"rank {here.rank} on {socket.gethostname()} does not reach rank 0 at {host}:{port} "
            f"({said}); is that the first node's name, is the port free "
            "there, and does it let this node in?"
        ) from error
    # torchrun's store outlives a start of its ranks.
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def init_rank(
    threads_per_rank: int = 1,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    *,
    deterministic: bool = False,
) -> Place:
    """This rank's place, after joining the process group of a job that a launcher started.

    Args:
        threads_per_rank: CPU threads of this rank.
        timeout_s: how long a collective may wait for the other ranks.
        deterministic: set the switches of ``platforms.deterministic``.

    Raises:
        LaunchError: no launcher's variables are set, or not where the ranks meet, or Slurm has not
            numbered them node by node.
    """
    here = place()
    if here is None:
        raise LaunchError(
            "this process is no rank of a job: neither RANK and WORLD_SIZE (torchrun) nor "
            "SLURM_PROCID and SLURM_NTASKS (srun) nor those of mpiexec are set; use `asvr`, "
            "torchrun, srun or mpiexec"
        )
    prepare_rank(here.local_rank, threads_per_rank, deterministic=deterministic)
    _require_node_order(here)
    store = open_store(here, timeout_s)
    init_group(here.rank, here.world_size, store=store, timeout_s=timeout_s)
    return here
