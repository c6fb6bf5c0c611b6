"""On how many nodes a run can go on."""

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest

from megatron_asvr.errors import ConfigError
from megatron_asvr.launch.elastic import start_nodes, usable_nodes
from megatron_asvr.launch.script import Job, Resources, render
from tests.run_cases import config


def test_numbers_of_nodes_divide_the_batch_and_hold_whole_models():
    run = config(train__global_batch=24, train__micro_batch=2)
    assert usable_nodes(run, 1) == (1, 2, 3, 4, 6, 12)
    assert usable_nodes(run, 2) == (1, 2, 3, 6)
    two = config(train__global_batch=24, train__micro_batch=2, parallel__tp=2)
    assert usable_nodes(two, 1) == (2, 4, 6, 8, 12, 24)
    packed = config(train__global_batch=24, train__micro_batch=4, data__packing=True)
    assert usable_nodes(packed, 1) == (1, 2, 3, 4, 5, 6)


def test_a_range_starts_with_the_most_that_it_can_use_and_its_smallest_must_do():
    assert start_nodes((2, 4, 6), 2, 5) == 4
    assert start_nodes((2, 4, 6), 3, 5) == 4
    with pytest.raises(ConfigError, match=r"--nodes=1-5: .* on 1 nodes; .*: 2, 4, 6"):
        start_nodes((2, 4, 6), 1, 5)
    with pytest.raises(ConfigError, match="none"):
        start_nodes((), 1, 5)


@pytest.mark.parametrize(
    ("usable", "written"),
    [((1, 2, 4), "1 2 4"), ((2, 4, 6, 8, 10), "{2..10..2}"), (tuple(range(1, 65)), "{1..64..1}")],
)
def test_the_script_knows_them(tmp_path, usable, written):
    wants = Resources(nodes=8, min_nodes=2, ranks_per_node=2, cpus_per_rank=3)
    folders = {"folder": tmp_path, "workdir": tmp_path}
    job = Job(name="n", purpose="p", command=["asvr"], resources=wants, usable=usable, **folders)
    script = render(job)
    assert f"for number in {written}; do" in script
    assert "#SBATCH --nodes=2-8\n#SBATCH --mincpus=6\n" in script
    assert "ntasks-per-node=2" not in script.partition("set -uo")[0]  # else it gets two nodes only
