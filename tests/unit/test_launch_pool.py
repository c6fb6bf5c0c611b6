"""Work over processes comes back in order, with its errors; launchers are understood."""

import math
import operator
import os
import subprocess
import sys
from functools import partial

import pytest

from megatron_asvr.errors import LaunchError
from megatron_asvr.launch.pool import workers
from tests.unit.data_corpus import MPIEXEC


@pytest.mark.parametrize("number", [1, 2])
def test_results_are_in_order(number):
    with workers(number) as run:
        assert list(run(operator.neg, range(20))) == [-n for n in range(20)]


def test_an_error_of_a_process_ends_the_call():
    with pytest.raises(ValueError, match="math domain"), workers(2) as run:
        list(run(math.sqrt, [4, -1, 1]))


def test_a_piece_that_kills_its_process_takes_no_other_with_it():
    pieces = [partial(operator.neg, number) for number in range(12)]
    wanted = [-number for number in range(12)]
    for fatal in (2, 3, 11):
        pieces[fatal], wanted[fatal] = partial(os._exit, 1), None
    with workers(2) as run:
        assert list(run(operator.call, pieces)) == wanted


def test_whoever_stops_half_way_gets_no_more():
    with workers(2) as run:
        found = run(operator.neg, range(4))
        assert next(found) == 0
    assert list(found) == []


def test_ranks_of_another_launcher_are_refused(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=r"torchrun started 2 processes.*--workers"), workers(2):
        pass


def test_mpi_without_its_package_names_the_extra(monkeypatch):
    for name, value in (("PMI_RANK", "0"), ("PMI_SIZE", "3"), ("MPI_LOCALRANKID", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(LaunchError, match=r"megatron_asvr\[mpi\]"), workers(2):
        pass


@pytest.mark.slow
@pytest.mark.skipif(MPIEXEC is None, reason="needs mpiexec: pip install mpi4py mpich")
def test_processes_of_mpi_share_the_work():
    script = (
        "from megatron_asvr.launch.pool import workers\n"
        "with workers(1) as run:\n"
        "    if run is not None:\n"
        "        print(list(run(abs, range(-5, 0))))\n"
    )
    command = [MPIEXEC, "-n", "3", sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == ["[5, 4, 3, 2, 1]"]  # from one of the three
