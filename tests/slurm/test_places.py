"""Where the ranks of a job are: numbered node by node, met on the first one."""

import re
import sys
from pathlib import Path

import pytest

from megatron_asvr.launch import slurm
from megatron_asvr.launch.script import Job, Resources, render
from tests.slurm.jobs import poll

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SHOW = """
import os
from megatron_asvr.launch import outcome
from megatron_asvr.launch.rank import init_rank, leave_group

here = init_rank()
print("rank", here.rank, "of", here.world_size, "on", os.uname().nodename, flush=True)
leave_group()
outcome.note(outcome.FINISHED)
"""


def test_ranks_are_numbered_node_by_node(cluster, tmp_path):
    job = Job(
        name="places",
        purpose="shows where the ranks are",
        command=[sys.executable, "-c", SHOW],
        folder=tmp_path / "job",
        workdir=Path.cwd(),
        resources=Resources(nodes=3, ranks_per_node=2),
        usable=(1, 2),
    )
    number = slurm.submit(job, render(job))
    log = tmp_path / "job" / f"{number}.log"
    poll(lambda: slurm.state(number)[0]["JobState"] == "COMPLETED", log.read_text)
    text = log.read_text()
    found = sorted(re.findall(r"rank (\d) of 4 on (\S+)", text))
    first, second, third = cluster.nodes[:3]
    assert found == [("0", first), ("1", first), ("2", second), ("3", second)]
    assert f"uses 2 of 3 nodes; idle: {third}" in text
