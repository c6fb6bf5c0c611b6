"""Positions are shared out so that every rank holds the same amount of every document."""

from itertools import pairwise

import numpy as np
import pytest

from megatron_asvr.errors import AsvrError
from megatron_asvr.parallel.context import (
    document_multiple,
    padded_lengths,
    partition,
    row_multiple,
)


def random_documents(cp, seed):
    """Where documents of random padded lengths start; some are empty."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(0, 6, size=9) * 2 * cp
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


@pytest.mark.parametrize(
    ("documents", "cp", "expected"),
    [
        ([0, 8], 2, [[0, 1, 6, 7], [2, 3, 4, 5]]),
        ([0, 4, 12], 2, [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]),
        ([0, 6, 6, 18], 3, [[0, 5, 6, 7, 16, 17], [1, 4, 8, 9, 14, 15], [2, 3, 10, 11, 12, 13]]),
    ],
)
def test_zig_zag_inside_each_document_written_by_hand(documents, cp, expected):
    for rank in range(cp):
        found = partition(np.array(documents, dtype=np.int32), documents[-1], cp, rank)
        assert found.dtype == np.int32
        assert found.tolist() == expected[rank]


@pytest.mark.parametrize("cp", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_every_position_has_one_rank_and_every_rank_equal_work(cp, seed):
    documents = random_documents(cp, seed)
    parts = [partition(documents, int(documents[-1]), cp, rank) for rank in range(cp)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(documents[-1]))
    for start, stop in pairwise(documents):
        own = [part[(part >= start) & (part < stop)] for part in parts]
        assert len({len(part) for part in own}) == 1
        # The keys that a rank's positions see: the work of causal attention.
        assert len({int((part - start + 1).sum()) for part in own}) == 1
        assert all((np.diff(part) > 0).all() for part in own)


def test_one_rank_holds_everything_in_order_whatever_the_lengths():
    assert partition(np.array([0, 3, 3, 8]), 8, 1, 0).tolist() == list(range(8))


@pytest.mark.parametrize(("documents", "total"), [([0, 6, 12], 12), ([0, 8], 16)])
def test_documents_that_cannot_be_shared_are_refused(documents, total):
    with pytest.raises(AsvrError, match=r"cannot be shared by 2 ranks.*multiple of 4"):
        partition(np.array(documents), total, 2, 0)


@pytest.mark.parametrize(
    ("tp", "cp", "sp", "document", "row"),
    [
        (1, 1, False, 1, 1),
        (4, 1, False, 1, 1),
        (4, 1, True, 1, 4),
        (1, 2, False, 4, 4),
        (2, 2, False, 4, 4),
        (2, 4, True, 16, 16),
    ],
)
def test_multiples(tp, cp, sp, document, row):
    assert document_multiple(tp=tp, cp=cp, sp=sp) == document
    assert row_multiple(tp=tp, cp=cp, sp=sp) == row


def test_lengths_are_rounded_up():
    assert padded_lengths([0, 1, 4, 5], 4) == [0, 4, 4, 8]
