"""The verdict of a preflight: who is at fault, from what the ranks have told."""

import itertools

from megatron_asvr.platforms import gpus

import pytest

from megatron_asvr.launch.findings import Limits, Seen, judge
from megatron_asvr.launch.node import Facts
from megatron_asvr.launch.preflight import MAX_ALL_PAIRS, _rounds


def facts(rank, **changes):
    return Facts(
        **{
            "rank": rank,
            "node": f"n{rank}",
            "python": "3.11.2",
            "code": "abc",
            "packages": {"numpy": "2.0"},
            "gpus": [],
            "folder": "/runs",
            "write_mb_s": 100.0,
            **changes,
        }
    )


def seen(*found, **changes):
    ranks = {f.rank: f for f in found}
    return Seen(
        **{
            "world": len(found),
            "names": {rank: f.node for rank, f in ranks.items()},
            "facts": ranks,
            "silent": {},
            "skews_s": dict.fromkeys(ranks, 0.0),
            "pairs": {},
            **changes,
        }
    )


def faults(report):
    return [(wrong["node"], wrong["check"]) for wrong in report.wrong]


def test_equal_nodes_pass():
    pairs = {("n0", "n1"): 2.0, ("n0", "n2"): 2.1, ("n1", "n2"): 1.9}
    report = judge(seen(facts(0), facts(1), facts(2), pairs=pairs), Limits())
    assert report.ok
    assert {state for _, state, _ in report.rows} == {"ok", "not checked"}
    assert ["n1", "n2", 1.9] in report.numbers["pairs_gb_s"]


def test_the_one_that_differs_from_most_is_named_even_when_it_is_rank_0():
    report = judge(seen(facts(0, packages={}), facts(1), facts(2)), Limits())
    assert faults(report) == [("n0", "software")]
    assert "numpy missing, elsewhere 2.0 (rank 0)" in report.wrong[0]["text"]


@pytest.mark.parametrize("change", [{"python": "3.12.1"}, {"code": "abd"}])
def test_python_and_code_are_compared(change):
    assert faults(judge(seen(facts(0), facts(1, **change)), Limits())) == [("n1", "software")]


def test_a_gpu_less_than_elsewhere():
    full = [facts(rank, gpus=["H100"] * 8) for rank in range(2)]
    report = judge(seen(*full, facts(2, gpus=["H100"] * 7)), Limits())
    assert faults(report) == [("n2", "gpus")]
    assert report.wrong[0]["text"] == "7 H100, elsewhere 8 H100"


def test_other_data_than_elsewhere():
    other = [facts(0, files=[3, 50]), facts(1, files=[3, 50]), facts(2, files=[2, 40])]
    assert faults(judge(seen(*other), Limits())) == [("n2", "data")]


def test_a_node_that_reaches_nobody_is_named_and_of_one_pair_both():
    pairs = {("n0", "n1"): 2.0, ("n0", "n2"): "timed out", ("n1", "n2"): "timed out"}
    assert faults(judge(seen(facts(0), facts(1), facts(2), pairs=pairs), Limits())) == [
        ("n2", "bandwidth")
    ]
    pairs = {("n0", "n1"): "timed out", ("n0", "n2"): 2.0, ("n1", "n2"): 2.0}
    assert faults(judge(seen(facts(0), facts(1), facts(2), pairs=pairs), Limits())) == [
        ("n0 - n1", "bandwidth")
    ]


def test_a_slow_node_is_named_and_fails_below_a_limit():
    pairs = {("n0", "n1"): 2.0, ("n0", "n2"): 0.5, ("n1", "n2"): 0.4, ("n1", "n3"): 2.0}
    pairs |= {("n0", "n3"): 2.0, ("n2", "n3"): 0.5}
    nodes = [facts(rank) for rank in range(4)]
    report = judge(seen(*nodes, pairs=pairs), Limits())
    assert report.ok
    (row,) = [row for row in report.rows if row[0] == "bandwidth"]
    assert row[1] == "slow"
    assert row[2].endswith("slow with every other: n2")
    strict = judge(seen(*nodes, pairs=pairs), Limits(min_gb_s=1.0))
    assert {node for node, _ in faults(strict)} == {"n0 - n2", "n1 - n2", "n2 - n3"}


@pytest.mark.parametrize("number", [1, 2, 5, 8])
def test_every_pair_is_measured_once_and_no_node_twice_a_round(number):
    nodes = [f"n{i}" for i in range(number)]
    rounds, left_out = _rounds(nodes)
    assert not left_out
    pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
    wanted = [frozenset(pair) for pair in itertools.combinations(nodes, 2)]
    assert sorted(pairs, key=sorted) == sorted(wanted, key=sorted)
    for pairs in rounds:
        assert len({node for pair in pairs for node in pair}) == 2 * len(pairs)


def test_of_very_many_nodes_each_is_measured_and_the_rest_is_said():
    nodes = [f"n{i}" for i in range(MAX_ALL_PAIRS + 1)]
    rounds, left_out = _rounds(nodes)
    assert {node for pairs in rounds for pair in pairs for node in pair} == set(nodes)
    assert "too many for all pairs" in left_out


def test_gpus_that_are_busy_or_damaged_are_in_trouble():
    lines = (
        "0, NVIDIA H100 80GB HBM3, 81559, 4, 0, 0, 570.86\n"
        "1, NVIDIA H100 80GB HBM3, 81559, 71000, 0, 0, 570.86\n"
        "2, NVIDIA H100 80GB HBM3, 81559, 4, 0, 3, 570.86\n"
        "3, Quadro, 8192, 4, [N/A], [N/A], 570.86\n"
    )
    free, used, damaged, old = gpus.parse(lines)
    assert free.trouble is None
    assert old.trouble is None
    assert "71000 of 81559 MiB" in used.trouble
    assert "3 uncorrected" in damaged.trouble
