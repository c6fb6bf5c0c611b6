"""Collectives and their gradients, against the same computation in one process."""

import os

import pytest
import torch
from torch import Tensor

from megatron_asvr.errors import AsvrError, LaunchError
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.parallel import collectives, groups
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.plan import ParallelPlan

pytestmark = pytest.mark.world

HIDDEN, WIDTH = 6, 8


def setup(world: int, **degrees: int) -> Groups:
    return groups.initialize(ParallelPlan(world=world, **degrees), 60.0)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_mlp() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output of a two-layer network, and gradients of its input and both matrices."""
    x, a, b = numbers(0, 5, HIDDEN), numbers(1, WIDTH, HIDDEN), numbers(2, HIDDEN, WIDTH)
    for t in (x, a, b):
        t.requires_grad_(True)
    y = torch.tanh(x @ a.T) @ b.T
    (y * numbers(3, *y.shape)).sum().backward()
    return y.detach(), x.grad, a.grad, b.grad


def split_mlp_matches(world: int) -> None:
    """The first matrix split by rows, the second by columns, as in tensor parallelism."""
    g = setup(world, tp=world)
    rows = slice(g.tp_rank * WIDTH // world, (g.tp_rank + 1) * WIDTH // world)
    x = numbers(0, 5, HIDDEN).requires_grad_(True)
    a = numbers(1, WIDTH, HIDDEN)[rows].clone().requires_grad_(True)
    b = numbers(2, HIDDEN, WIDTH)[:, rows].clone().requires_grad_(True)
    middle = torch.tanh(collectives.copy_to_tp(x, group=g.tp) @ a.T)
    y = collectives.reduce_from_tp(middle @ b.T, group=g.tp)
    (y * numbers(3, *y.shape)).sum().backward()
    want_y, want_x, want_a, want_b = reference_mlp()
    torch.testing.assert_close(y.detach(), want_y)
    torch.testing.assert_close(x.grad, want_x)
    torch.testing.assert_close(a.grad, want_a[rows])
    torch.testing.assert_close(b.grad, want_b[:, rows])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_split_network_has_the_gradients_of_the_whole(world):
    run_ranks(split_mlp_matches, (world,), world, timeout_s=300)


def gathered_rows_match(world: int, sizes: tuple[int, ...]) -> None:
    """Each rank encodes its own images; behind them the computation is replicated."""
    g = setup(world, tp=world)
    images = numbers(4, sum(sizes), 3, HIDDEN)
    weight = numbers(5, HIDDEN, HIDDEN).requires_grad_(True)
    start = sum(sizes[: g.tp_rank])
    mine = images[start : start + sizes[g.tp_rank]].clone().requires_grad_(True)
    whole = collectives.gather_images(mine @ weight, sizes=sizes, group=g.tp, sum_over=g.cp)
    (torch.tanh(whole) * numbers(6, *whole.shape)).sum().backward()
    weight_grad = collectives.all_reduce_sum(weight.grad, group=g.tp)  # partial on each rank

    all_images = images.clone().requires_grad_(True)
    all_weight = numbers(5, HIDDEN, HIDDEN).requires_grad_(True)
    want = all_images @ all_weight
    (torch.tanh(want) * numbers(6, *want.shape)).sum().backward()
    torch.testing.assert_close(whole.detach(), want.detach())
    torch.testing.assert_close(mine.grad, all_images.grad[start : start + sizes[g.tp_rank]])
    torch.testing.assert_close(weight_grad, all_weight.grad)


@pytest.mark.parametrize("sizes", [(3,), (2, 3), (0, 2), (0, 0), (1, 0, 4, 2)])
def test_gathered_images_have_the_gradients_of_one_process(sizes):
    run_ranks(gathered_rows_match, (len(sizes), sizes), len(sizes), timeout_s=300)


def wrong_sizes() -> None:
    g = setup(2, tp=2)
    with pytest.raises(AsvrError, match="brings 4 rows"):
        collectives.gather_images(
            torch.ones(4, 1), sizes=(3, 4)[:: 1 - 2 * g.rank], group=g.tp, sum_over=g.cp
        )
    with pytest.raises(AsvrError, match="group of 2"):
        collectives.gather_images(torch.ones(4, 1), sizes=(4,), group=g.tp, sum_over=g.cp)


def statistics_match() -> None:
    g = setup(2, tp=2)
    x = torch.tensor([1.0, -2.0]).mul(g.rank + 1).requires_grad_(True)
    total = collectives.all_reduce_sum(x, group=g.tp)
    largest = collectives.all_reduce_max(x, group=g.tp)
    assert total.tolist() == [3.0, -6.0]
    assert largest.tolist() == [2.0, -2.0]
    assert x.tolist() == [g.rank + 1.0, -2.0 * (g.rank + 1)]  # the argument stays
    assert not total.requires_grad
    counts = collectives.all_reduce_sum(torch.tensor(2**53 + g.rank), group=g.tp)
    assert counts.item() == 2**54 + 1  # exact, not through floats


def gathered_columns_match() -> None:
    """Every rank uses the gathered rows in its own way: gradients of a rank's rows are summed."""
    g = setup(2, cp=2)
    whole = numbers(7, 6, HIDDEN).requires_grad_(True)
    weights = [numbers(8 + rank, 6, HIDDEN) for rank in range(2)]
    sum((torch.tanh(whole) * weight).sum() for weight in weights).backward()
    rows = slice(3 * g.cp_rank, 3 * g.cp_rank + 3)
    mine = whole.detach()[rows].clone().requires_grad_(True)
    gathered = collectives.gather_columns(mine, group=g.cp)
    torch.testing.assert_close(gathered.detach(), whole.detach(), rtol=0, atol=0)
    (torch.tanh(gathered) * weights[g.cp_rank]).sum().backward()
    torch.testing.assert_close(mine.grad, whole.grad[rows])


def plain_ones_match() -> None:
    g = setup(4, tp=2, dp=2)
    x, strided = torch.full((), 1.0 + g.rank), torch.arange(6.0).view(2, 3).T.requires_grad_(True)
    mine = strided.detach() * (1 + g.rank)
    collectives.sum_in_place([x, mine, torch.empty(0)], group=g.world)
    assert x == 10
    assert torch.equal(mine, strided * 10)
    shards = collectives.gather_equal(strided * g.rank, group=g.dp)
    assert torch.equal(shards[0], strided * g.tp_rank)
    assert torch.equal(shards[1], strided * (g.tp_rank + 2))
    assert not shards[0].requires_grad
    assert collectives.gather_objects({"rank": g.rank}, group=g.dp) == [
        {"rank": g.tp_rank},
        {"rank": g.tp_rank + 2},
    ]
    # The source is a rank of the group, not of the world.
    assert collectives.broadcast_object(g.rank, 1, group=g.dp) == g.tp_rank + 2
    sent = strided.to(torch.bfloat16) if g.dp_rank else None
    got = collectives.broadcast_tensor(sent, 1, group=g.dp)
    assert torch.equal(got, strided.to(torch.bfloat16))
    collectives.barrier(group=g.world)


def nothing_to_send() -> None:
    """A rank alone, and tensors without elements, need no communication."""
    x = torch.ones(2)
    collectives.sum_in_place([x], group=None)
    assert torch.equal(collectives.all_reduce_sum(x, group=None), torch.ones(2))
    assert collectives.gather_objects(3, group=None) == [3]
    assert collectives.broadcast_object(3, group=None) == 3
    assert collectives.gather_equal(x, group=None)[0] is not None
    assert collectives.broadcast_tensor(x, group=None) is x
    collectives.barrier(group=None)
    g = setup(2, tp=2)
    assert collectives.all_reduce_sum(torch.empty(0, 3), group=g.tp).shape == (0, 3)
    assert [s.shape for s in collectives.gather_equal(torch.empty(0, 3), group=g.tp)] == [
        (0, 3)
    ] * 2


def refuses_what_nccl_cannot() -> None:
    g = setup(2, tp=2)
    with pytest.raises(AsvrError, match=r"\(2,\) torch.bool on cpu over 2 ranks: no dtype"):
        collectives.all_reduce_sum(torch.tensor([True, False]), group=g.tp)
    with pytest.raises(AsvrError, match="gloo wants tensors on cpu"):
        collectives.gather_equal(torch.empty(2, device="meta"), group=g.tp)
    with pytest.raises(AsvrError, match=r"float32.*float64"):
        collectives.sum_in_place([torch.ones(1), torch.ones(1).double()], group=g.tp)
    with pytest.raises(AsvrError, match="its memory is strided"):
        collectives._check("all_reduce", torch.ones(2, 3).T, g.tp)


def disagreements_reach_every_rank() -> None:
    g = setup(4, tp=4)
    odd = g.rank == 2
    with collectives.checked_sizes():
        want = r"disagree.*: rank 2: \('all_reduce SUM', \(3,\), torch.float32\); rank 0 brings"
        with pytest.raises(AsvrError, match=want):
            collectives.all_reduce_sum(torch.ones(3 if odd else 2), group=g.tp)
        with pytest.raises(AsvrError, match=r"rank 2: .*float64"):
            collectives.gather_equal(torch.ones(2, dtype=torch.double if odd else None), group=g.tp)
        x = torch.ones(3 if odd else 2, requires_grad=True)
        y = collectives.copy_to_tp(x, group=g.tp).sum()
        with pytest.raises(AsvrError, match=want):
            y.backward()
        with pytest.raises(AsvrError, match=r"rank 2: \('barrier',\); rank 0 brings \('gather_obj"):
            collectives.barrier(group=g.tp) if odd else collectives.gather_objects(1, group=g.tp)
        assert collectives.all_reduce_sum(torch.ones(2), group=g.tp).tolist() == [4.0, 4.0]


def the_environment_asks_for_checks() -> None:
    g = setup(2, tp=2)
    os.environ["ASVR_CHECK_COLLECTIVES"] = "1"
    with pytest.raises(AsvrError, match="disagree"):
        collectives.all_reduce_sum(torch.ones(1 + g.rank), group=g.tp)


@pytest.mark.parametrize(
    ("fn", "world"),
    [
        (wrong_sizes, 2),
        (the_environment_asks_for_checks, 2),
        (statistics_match, 2),
        (gathered_columns_match, 2),
        (plain_ones_match, 4),
        (nothing_to_send, 2),
        (refuses_what_nccl_cannot, 2),
        (disagreements_reach_every_rank, 4),
    ],
)
def test_every_rank_agrees(fn, world):
    run_ranks(fn, (), world, timeout_s=300)


def places(plan: ParallelPlan) -> None:
    g = groups.initialize(plan, 60.0)
    sizes = {name: getattr(g, name).size() for name in ("tp", "dp", "pp", "cp", "dp_cp", "world")}
    assert sizes == {
        "tp": plan.tp,
        "dp": plan.dp,
        "pp": plan.pp,
        "cp": plan.cp,
        "dp_cp": plan.dp * plan.cp,
        "world": plan.world,
    }
    assert g.tp_cp.size() == plan.tp * plan.cp
    # Fastest first: tensor, context, data, pipeline.
    place = g.tp_rank + plan.tp * (g.cp_rank + plan.cp * (g.dp_rank + plan.dp * g.pp_rank))
    assert place == g.rank
    assert g.is_first_stage == (g.pp_rank == 0)
    assert g.is_last_stage == (g.pp_rank == plan.pp - 1)
    groups.destroy()
    groups.initialize(plan, 60.0)  # a second model in the same process


@pytest.mark.parametrize(
    "plan",
    [
        ParallelPlan(tp=2, dp=2, world=4),
        ParallelPlan(tp=2, pp=2, world=4),
        ParallelPlan(cp=2, dp=2, world=4),
    ],
    ids=ParallelPlan.describe,
)
def test_every_rank_finds_its_place(plan):
    run_ranks(places, (plan,), plan.world, timeout_s=300)


def refuses_other_worlds() -> None:
    with pytest.raises(LaunchError, match="the plan has 4 ranks, the job 2"):
        groups.initialize(ParallelPlan(tp=4, world=4), 60.0)


def refuses_without_a_job() -> None:
    with pytest.raises(LaunchError, match="not initialised"):
        groups.initialize(ParallelPlan(), 60.0)


def test_a_plan_that_does_not_fit_the_job_is_refused():
    run_ranks(refuses_other_worlds, (), 2, timeout_s=300)
    run_ranks(refuses_without_a_job, (), 1, timeout_s=60, init=False)
