"""Ranks that torchrun started join its job."""

import pathlib
import subprocess
import sys

import pytest

from megatron_asvr.launch import job
from megatron_asvr.parallel import groups
from megatron_asvr.parallel.plan import ParallelPlan

pytestmark = [pytest.mark.world, pytest.mark.slow]


def where() -> str:
    g = groups.initialize(ParallelPlan(tp=2, world=2), 60.0)
    return f"tp_rank {g.tp_rank} of {g.tp.size()}"


def main() -> None:
    print(job.run(where, (), 2))  # noqa: T201


def test_torchrun():
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.world.test_launched"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tp_rank 0 of 2" in done.stdout
    assert "tp_rank 1 of 2" in done.stdout


if __name__ == "__main__":
    main()
