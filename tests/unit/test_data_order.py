"""The samples of a step depend on (seed, step) only, not on the number of ranks."""

import pytest

from megatron_asvr.data.order import StepOrder, micro_batches, num_micro_batches, rank_part


def test_epochs_are_permutations_that_follow_one_another():
    order = StepOrder(10, 4, seed=3)
    flat = [i for step in range(5) for i in order.indices(step)]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert order.steps == 3


def test_order_depends_on_seed_and_step_only():
    late = StepOrder(100, 8, seed=1).indices(37)
    order = StepOrder(100, 8, seed=1)
    assert [order.indices(step) for step in range(38)][37] == late
    assert StepOrder(100, 8, seed=2).indices(37) != late


def test_order_is_pinned():
    # A change of these numbers would silently give every resumed run another data order.
    assert StepOrder(10, 5, seed=0).indices(0) == [0, 7, 8, 6, 9]


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_ranks_together_hold_the_global_batch(dp):
    items = StepOrder(100, 8, seed=1).indices(5)
    assert [i for rank in range(dp) for i in rank_part(items, rank, dp)] == items


@pytest.mark.parametrize("dp", [1, 2, 3, 4])
@pytest.mark.parametrize("num_items", [0, 1, 7, 8])
@pytest.mark.parametrize("multiple", [1, 2])
def test_every_rank_has_as_many_micro_batches(num_items, dp, multiple):
    items = list(range(num_items))
    count = num_micro_batches(num_items, dp, 3, multiple=multiple)
    parts = [micro_batches(rank_part(items, rank, dp), 3, count) for rank in range(dp)]
    assert [i for part in parts for batch in part for i in batch] == items
    assert {len(part) for part in parts} == {count}
    assert count >= 1
    assert count % multiple == 0
    assert count == multiple or any(len(part[count - multiple]) for part in parts)  # no more


def test_evaluation_meets_every_sample_once():
    order = StepOrder(10, 4, seed=3, shuffle=False)
    assert [i for step in range(order.steps) for i in order.indices(step)] == list(range(10))
