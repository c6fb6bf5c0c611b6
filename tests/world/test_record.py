"""Schedules of collectives of real training steps, and of ranks that differ."""

import datetime
import pickle
from pathlib import Path

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch
import torch.distributed as dist

from megatron_asvr.config.schema import Config
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.parallel import collectives
from megatron_asvr.parallel.record import Entry, Recorder, compare_schedules
from tests.run_cases import Bench
from tests.world.test_experts import mixture
from tests.world.test_train_layouts import layout_config, start

pytestmark = pytest.mark.world

LAYOUTS: dict[str, tuple[int, Config]] = {
    "tp2_sp_pp2": (4, layout_config({"tp": 2, "pp": 2, "sp": True})),
    "pp2_vpp2": (2, layout_config({"pp": 2, "vpp": 2})),
    "tp2_cp2": (4, layout_config({"tp": 2, "cp": 2})),
    "ep2_dp2": (2, mixture("mixtral", {"ep": 2})),
}


def training_step(run: Config, odd_rank: int | None) -> list[list[Entry]]:
    """What every rank recorded; gloo lets an odd rank sum what it holds in another type."""
    groups = start(run)
    bench = Bench(run, groups)
    with Recorder() as recorder:
        bench.step(0)
        dtype = torch.int32 if groups.rank == odd_rank else torch.float32
        collectives.sum_in_place([torch.zeros(3, dtype=dtype)], group=groups.world)
    return collectives.gather_objects(recorder.entries, group=groups.world)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ranks_of_a_training_step_issue_the_same_collectives(layout: str) -> None:
    world, run = LAYOUTS[layout]
    by_rank = run_ranks(training_step, (run, None), world, timeout_s=120)
    assert compare_schedules(by_rank) == []
    for entries in by_rank:
        places = {entry.where for entry in entries}
        assert any(place.startswith("megatron.core.") for place in places)
        assert any(place.startswith("megatron_asvr.train.step.") for place in places)
        assert any(place.endswith(".backward") for place in places) == ("tp" in layout)
        ops = {entry.op for entry in entries}
        assert ({"send", "recv"} <= ops) == ("pp" in layout)
        assert ("alltoall_base" in ops) == ("ep" in layout)


def test_one_rank_that_differs_is_named() -> None:
    world, run = LAYOUTS["tp2_sp_pp2"]
    by_rank = run_ranks(training_step, (run, 2), world, timeout_s=120)
    (finding,) = compare_schedules(by_rank)
    assert finding.startswith("group [0, 1, 2, 3], collective ")
    assert "ranks 0, 1, 3: allreduce of float32 [(3,)] in tests.world.test_record" in finding
    assert "rank 2: allreduce of int32 [(3,)]" in finding


def every_kind() -> list[list[Entry]]:
    """The operations that no training step above uses, as torch issues them."""
    rank, x = dist.get_rank(), torch.ones(2)
    halves = [torch.empty(2), torch.empty(2)]
    with Recorder() as recorder:
        ends = [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, halves[0], 1 - rank)]
        for request in dist.batch_isend_irecv(ends):
            request.wait()
        dist.all_to_all_single(torch.empty(3 - 2 * rank), x, [2 - 2 * rank, 1], [2 - rank, rank])
        dist.gather(x, halves if rank == 0 else None, dst=0)
        dist.scatter(torch.empty(2), [x, x] if rank == 1 else None, src=1)
        dist.reduce(x, 1)
        dist.barrier()
        collectives.broadcast_object({"rank": rank}, 1, group=dist.group.WORLD)
    return collectives.gather_objects(recorder.entries, group=dist.group.WORLD)


def test_messages_rooted_and_uneven_collectives_are_recorded() -> None:
    by_rank = run_ranks(every_kind, (), 2, timeout_s=300)
    assert compare_schedules(by_rank) == []
    assert [(entry.op, entry.peer) for entry in by_rank[0]] == [
        ("send", 1),
        ("recv", 1),
        ("alltoall_base", None),
        ("gather", 0),
        ("scatter", 1),
        ("reduce", 1),
        ("barrier", None),
        ("broadcast", 1),
        ("broadcast", 1),
    ]
    assert by_rank[0][2].sizes == ((2, 0), (2, 1))


def one_rank_stays_away(folder: str) -> None:
    group = dist.new_group(timeout=datetime.timedelta(seconds=10))
    with Recorder() as recorder:
        collectives.all_reduce_sum(torch.ones(1), group=group)
        if dist.get_rank() != 1:
            with pytest.raises(RuntimeError, match=r"Connection closed by peer|[Tt]imed? ?out"):
                collectives.barrier(group=group)
    Path(folder, str(dist.get_rank())).write_bytes(pickle.dumps(recorder.entries))


def test_what_a_rank_waits_for_in_vain_is_recorded(tmp_path: Path) -> None:
    run_ranks(one_rank_stays_away, (str(tmp_path),), 2, timeout_s=300)
    by_rank = [pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(2)]
    (finding,) = compare_schedules(by_rank)
    assert "rank 0: barrier" in finding
    assert "rank 1: nothing more" in finding
