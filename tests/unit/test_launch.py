"""A rank's place in its job, from the variables of torchrun and Slurm."""

import os

import pytest
import torch.distributed as dist

from megatron_asvr.errors import LaunchError
from megatron_asvr.launch import job
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.launch.rank import Place, init_rank, place


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_", "MPI_", "PMI_", "OMPI_")) or name.endswith(
            ("RANK", "WORLD_SIZE")
        ):
            monkeypatch.delenv(name)


def test_started_by_hand_there_is_no_place():
    assert place() is None
    with pytest.raises(LaunchError, match="no rank of a job"):
        init_rank()


def test_torchrun(monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert place() == Place(launcher="torchrun", rank=5, world_size=8, local_rank=1)


def test_a_slurm_step_is_a_launcher_and_its_batch_script_is_not(monkeypatch):
    for name, value in {"PROCID": "3", "NTASKS": "4", "LOCALID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert place() is None
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert place() == Place(launcher="Slurm", rank=3, world_size=4, local_rank=1)


def test_ranks_that_slurm_did_not_number_node_by_node_are_refused(monkeypatch):
    names = {"PROCID": "1", "NTASKS": "4", "STEP_ID": "0", "STEP_NUM_NODES": "2"}
    for name, value in {**names, "NODEID": "1", "LOCALID": "0"}.items():  # cyclic
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(LaunchError, match=r"process 0 of node 1 rank 1, wanted 2: .*=block"):
        init_rank()
    monkeypatch.setenv("SLURM_PROCID", "2")
    with pytest.raises(LaunchError, match="MASTER_ADDR and MASTER_PORT"):  # what comes next
        init_rank()


@pytest.mark.parametrize(
    ("prefix", "local"), [("PMI", "MPI_LOCALRANKID"), ("OMPI_COMM_WORLD", None)]
)
def test_mpi_comes_before_the_slurm_that_it_may_run_in(monkeypatch, prefix, local):
    for name, value in {"PROCID": "0", "NTASKS": "2", "LOCALID": "0", "STEP_ID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv(f"{prefix}_RANK", "5")
    monkeypatch.setenv(f"{prefix}_SIZE", "8")
    assert place().launcher == "Slurm"  # which sets these two for its own ranks, too
    monkeypatch.setenv(local or f"{prefix}_LOCAL_RANK", "1")
    assert place() == Place(launcher="MPI", rank=5, world_size=8, local_rank=1)


def test_a_job_without_a_meeting_point_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="MASTER_ADDR and MASTER_PORT"):
        init_rank()


def test_a_job_of_another_size_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(LaunchError, match="started 4 ranks, the settings want 2"):
        job.run(dist.get_rank, (), 2)


def test_a_function_that_ranks_cannot_import_is_refused():
    def local():
        """Not at the top of a module."""

    local.__module__ = "__main__"
    with pytest.raises(LaunchError, match="move it to a module"):
        run_ranks(local, (), 1)
