"""Independent pieces of work over processes: of this machine, or of a job that MPI started."""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

from megatron_asvr.errors import LaunchError
from megatron_asvr.launch.mpi import world
from megatron_asvr.launch.rank import place

Run = Callable[..., Iterable]


@contextlib.contextmanager
def workers(number: int) -> Iterator[Run | None]:
    """A ``map`` whose pieces run in other processes, in order and none of them twice.

    Under ``mpiexec`` the first process gets it and the others work for it; they get None, when
    there is no more work. A process that fails ends the whole call with its error.

    Args:
        number: processes to start; 1 works here. MPI's own number wins.

    Raises:
        LaunchError: another launcher started several processes, or mpi4py is missing.
    """
    here = place()
    if here is not None and here.launcher == "MPI" and here.world_size > 1:
        world(here.world_size)
        with _mpi() as run:
            yield run
        return
    if here is not None and here.world_size > 1:
        raise LaunchError(
            f"{here.launcher} started {here.world_size} processes, but this command starts its "
            "own; call it once with --workers, or with mpiexec"
        )
    if number == 1:
        yield map
        return
    with ProcessPoolExecutor(number, multiprocessing.get_context("forkserver")) as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _mpi() -> Iterator[Run | None]:
    from mpi4py.futures import MPICommExecutor

    with MPICommExecutor() as pool:
        yield pool.map if pool is not None else None
