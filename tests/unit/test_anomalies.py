"""Which batch a step trains on when some are left out, and which loss is a spike."""

import math

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest

from megatron_asvr.config.schema import AnomalyConfig
from megatron_asvr.data.order import batch_of
from megatron_asvr.train.anomalies import spike_limit

SPIKES = AnomalyConfig(on_spike="skip", spike_window=5, spike_mads=3.0)


@pytest.mark.parametrize("gaps", [[], [0], [4], [3, 4], [0, 1, 5, 9], [9, 3, 4]])
def test_left_out_batches_are_gaps_in_the_order(gaps):
    wanted = [number for number in range(20) if number not in gaps]
    assert [batch_of(step, gaps) for step in range(20 - len(gaps))] == wanted


def test_a_spike_is_far_above_the_median():
    losses = [2.0, 2.2, 1.8, 2.4, 1.6]
    assert spike_limit(losses, SPIKES) == pytest.approx(2.0 + 3 * 1.4826 * 0.2)
    assert spike_limit([1.0, *losses[1:]], SPIKES) == pytest.approx(1.8 + 3 * 1.4826 * 0.4)


def test_equal_losses_have_some_spread_too():
    assert spike_limit([2.0] * 5, SPIKES) == pytest.approx(2.0 + 3 * 0.02)


def test_nothing_is_a_spike_before_the_window_is_full_or_where_they_are_ignored():
    assert spike_limit([2.0] * 4, SPIKES) == math.inf
    assert spike_limit([2.0] * 5, AnomalyConfig(spike_window=5)) == math.inf
