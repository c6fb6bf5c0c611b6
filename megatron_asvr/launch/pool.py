"""Independent pieces of work over processes: of this machine, or of a job that MPI started."""

import contextlib
import itertools
import logging
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megatron_asvr.errors import LaunchError
from megatron_asvr.launch.mpi import world
from megatron_asvr.launch.rank import place

logger = logging.getLogger(__name__)

Run = Callable[..., Iterable]


@contextlib.contextmanager
def workers(number: int) -> Iterator[Run | None]:
    """A ``map`` whose pieces run in other processes; their results come in order.

    Under ``mpiexec`` the first process gets it and the others work for it; they get None, when
    there is no more work. A piece that fails ends the whole call with its error. One whose process
    dies, also when it is alone, gives None (not under MPI, which then ends the job).

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
    begun = []

    def run(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        begun.append(_each(number, function, items))
        return begun[-1]

    try:
        yield run
    finally:
        for each in begun:  # whoever stopped half-way wants no more of it
            each.close()


def _each(number: int, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """The results of all items, in order; None where a process died of an item alone."""
    left, careful = deque(items), 0
    while left:
        dead = False
        try:
            with _pool(1 if careful else number) as pool:
                chosen = itertools.islice(left, careful or None)
                for future in [pool.submit(function, item) for item in chosen]:
                    result = future.result()
                    left.popleft()
                    yield result
            careful = 0
        except BrokenProcessPool:
            dead = careful == 1
            if not careful:
                logger.warning("a process died; what it and the others had begun is tried again")
                careful = 2 * number + 1  # more than had begun, in one process after the other
            else:
                careful = 1 - dead  # of one process only the first can be the cause: it goes alone
        if dead:
            left.popleft()
            yield None


@contextlib.contextmanager
def _pool(number: int) -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(number, multiprocessing.get_context("forkserver")) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _mpi() -> Iterator[Run | None]:
    from mpi4py.futures import MPICommExecutor

    with MPICommExecutor() as pool:
        yield pool.map if pool is not None else None
