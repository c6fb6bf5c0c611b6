"""The samples of a step depend on (seed, step) only, not on the number of ranks."""

from collections import Counter

import pytest

from megatron_asvr.config.schema import SourceConfig
from megatron_asvr.data.order import StepOrder, blend


def test_epochs_are_permutations_that_follow_one_another():
    order = StepOrder([10], 4, seed=3)
    flat = [i for step in range(5) for i in order.indices(step)]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert order.steps == 3


def test_order_depends_on_seed_and_step_only():
    late = StepOrder([100], 8, seed=1).indices(37)
    order = StepOrder([100], 8, seed=1)
    assert [order.indices(step) for step in range(38)][37] == late
    assert StepOrder([100], 8, seed=2).indices(37) != late


def test_order_is_pinned():
    # A change of these numbers would silently give every resumed run another data order.
    assert StepOrder([10], 5, seed=0).indices(0) == [0, 7, 8, 6, 9]


def test_evaluation_meets_every_sample_once():
    order = StepOrder([10], 4, seed=3, shuffle=False)
    assert [i for step in range(order.steps) for i in order.indices(step)] == list(range(10))


def source(**settings):
    return SourceConfig(path="x", **settings)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ([{}, {}], [90, 10]),
        ([{"weight": 1.0}, {"weight": 1.0}], [50, 50]),
        ([{"weight": 3.0}, {"weight": 1.0, "max_samples": 20}], [75, 20]),
        ([{"epochs": 0.5}, {"epochs": 3.0}], [45, 30]),
        ([{"weight": 1.0}, {"weight": 1e-6}], [100, 1]),
    ],
)
def test_blend(settings, wanted):
    assert blend([source(**s) for s in settings], [90, 10]) == wanted


def test_a_blend_takes_its_shares_and_every_sample_alike():
    order = StepOrder([90, 10], 20, seed=5, taken=[50, 50])
    assert order.steps == 5
    epochs = [[i for s in range(5 * e, 5 * e + 5) for i in order.indices(s)] for e in range(9)]
    for flat in epochs:
        assert sum(i >= 90 for i in flat) == 50
        assert set(Counter(i for i in flat if i >= 90).values()) == {5}
    met = Counter(i for flat in epochs for i in flat if i < 90)
    assert len(met) == 90
    assert set(met.values()) == {5}  # 450 samples of 90, no sample ahead of another
    assert epochs[0] != epochs[1]
    again = StepOrder([90, 10], 20, seed=5, taken=[50, 50])
    assert again.indices(31) == epochs[6][20:40]


def test_sources_taken_whole_are_shuffled_as_one():
    assert StepOrder([60, 40], 8, seed=1).indices(5) == StepOrder([100], 8, seed=1).indices(5)


def test_neighbours_are_of_one_source():
    order = StepOrder([3, 0, 4], 2, seed=0)
    assert [order.neighbours(i) for i in (0, 2, 3, 6)] == [range(3)] * 2 + [range(3, 7)] * 2


def test_evaluation_meets_the_first_of_a_capped_source():
    order = StepOrder([5, 5], 4, seed=3, taken=[2, 5], shuffle=False)
    assert [i for s in range(order.steps) for i in order.indices(s)] == [0, 1, 5, 6, 7, 8, 9]
