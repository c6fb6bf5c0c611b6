"""Which ranks are slow."""

from megatron_asvr.train.pace import slow_ranks


def test_ranks_far_above_the_median_are_slow_and_the_slowest_comes_first():
    assert slow_ranks([1.0, 1.1, 0.9, 1.5, 1.0, 2.0], 0.2) == (1.0, {5: 2.0, 3: 1.5})


def test_a_share_is_allowed():
    assert slow_ranks([1.0, 1.0, 1.19], 0.2) == (1.0, {})


def test_of_two_the_faster_is_the_usual_one():
    assert slow_ranks([3.0, 1.0], 0.2) == (1.0, {0: 3.0})
