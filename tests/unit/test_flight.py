"""Who keeps whom waiting, from what the ranks say."""

import pytest

from megatron_asvr.parallel.flight import Call, Words, culprits, departure, missing


def call(number: int, form: str = "all_reduce [4] Long", group: str = "0", **more) -> Call:
    return Call(group=group, number=number, form=form, where=more.pop("where", "a.py:1"), **more)


def waiting(at: Call, *, members=(0, 1), counts=None, departure=None) -> Words:
    return Words(
        doing="step 3",
        where="a.py:1",
        waits=True,
        call=at,
        members=members,
        counts=counts or {at.group: at.number},
        departure=departure,
    )


ELSEWHERE = Words(doing="step 3", where="b.py:7", waits=False, counts={"0": 4})
STAGE = Words(doing="step 3", where="p2p.py:9", waits=True, counts={"0": 5})


@pytest.mark.parametrize(
    ("words", "world", "wanted"),
    [
        pytest.param({0: waiting(call(5))}, 2, [1], id="one_says_nothing"),
        pytest.param({0: waiting(call(5)), 1: ELSEWHERE}, 2, [1], id="one_waits_for_nobody"),
        pytest.param(
            {0: waiting(call(5), members=(0, 1, 2)), 1: waiting(call(4)), 2: STAGE},
            3,
            [1],
            id="one_has_not_come",
        ),
        pytest.param(
            {
                0: waiting(call(5), counts={"0": 5, "7": 2}),
                1: waiting(call(3, group="7"), counts={"0": 4, "7": 3}, departure="new"),
            },
            2,
            [1],
            id="two_wait_for_each_other_and_one_does_something_new",
        ),
        pytest.param(
            {0: waiting(call(5)), 1: waiting(call(5, "all_reduce [9] Double"), departure="new")},
            2,
            [1],
            id="one_brings_something_else",
        ),
        pytest.param({0: waiting(call(5)), 1: waiting(call(5))}, 2, [], id="nobody"),
        pytest.param(
            {rank: waiting(call(5), departure="new") for rank in (0, 1)}, 2, [], id="all_are_new"
        ),
    ],
)
def test_who_is_the_cause(words, world, wanted):
    assert culprits(words, world) == wanted


def test_another_collective_at_the_same_place_is_none():
    words = {0: waiting(call(5)), 1: waiting(call(5, "all_gather [4] Long"))}
    assert missing(words, 0) == [1]
    assert missing({0: waiting(call(5)), 1: waiting(call(5))}, 0) == []


def steps(*skipped: tuple[int, str]) -> list[Call]:
    """Three collectives in each of five steps, at lines of their own; some are left out."""
    made = [(step, where) for step in range(5) for where in ("agree", "gather", "sum")]
    left = [place for place in made if place not in skipped]
    return [call(n, where=where, time_ns=step) for n, (step, where) in enumerate(left)]


def test_a_call_that_is_left_out_is_seen():
    assert departure(steps(), since_ns=4) is None
    found = departure(steps((4, "agree")), since_ns=4)
    assert "at gather, where until now followed: all_reduce [4] Long at agree" in found


def test_what_was_done_before_is_not_new():
    assert departure(steps((2, "agree"), (4, "agree")), since_ns=4) is None
    assert departure(steps((2, "agree")), since_ns=4) is None
