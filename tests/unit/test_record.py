"""Schedules of collectives: what is a difference, and how it is told."""

from dataclasses import replace

from megatron_asvr.parallel.record import Entry, compare_schedules

SUM = Entry(op="allreduce", ranks=(0, 1), sizes=((4,),), dtype="float32", where="step.sum")
GATHER = Entry(op="allgather", ranks=(0, 1), sizes=((2,), (1,), (1,)), dtype="int64", where="loop")


def message(source: int, target: int, *shape: int, where: str = "p2p") -> tuple[Entry, Entry]:
    """Both ends of a message."""
    send = Entry(op="send", ranks=(0, 1), sizes=(shape,), dtype="float32", peer=target, where=where)
    return send, replace(send, op="recv", peer=source)


def test_equal_schedules_have_no_findings() -> None:
    elsewhere = replace(SUM, where="other.code")  # the same collective from another line
    assert compare_schedules([[SUM, GATHER], [elsewhere, GATHER]]) == []
    assert compare_schedules([[], []]) == []


def test_the_first_difference_in_a_group_is_told_with_all_ranks() -> None:
    wide = replace(SUM, ranks=(0, 1, 2))
    other = replace(wide, sizes=((5,),), where="step.other")
    (finding,) = compare_schedules([[wide, wide], [wide, other, other], [wide, wide]])
    assert finding == (
        "group [0, 1, 2], collective 1: ranks 0, 2: allreduce of float32 [(4,)] in step.sum; "
        "rank 1: allreduce of float32 [(5,)] in step.other"
    )


def test_another_dtype_operation_root_or_a_missing_one_is_found() -> None:
    root = Entry(op="broadcast", ranks=(0, 1), sizes=((1,),), dtype="int64", peer=0)
    for mine, theirs in [
        (SUM, replace(SUM, dtype="bfloat16")),
        (SUM, GATHER),
        (root, replace(root, peer=1)),
    ]:
        assert len(compare_schedules([[mine], [theirs]])) == 1
    (finding,) = compare_schedules([[SUM, GATHER], [SUM]])
    assert "collective 1" in finding
    assert "rank 1: nothing more" in finding


def test_messages_are_matched_in_order_both_ways() -> None:
    there, arrives = message(0, 1, 3)
    back, returns = message(1, 0, 3)
    assert compare_schedules([[there, returns], [back, arrives]]) == []
    large, large_arrives = message(0, 1, 9)
    assert compare_schedules([[there, large], [arrives, large_arrives]]) == []
    (finding,) = compare_schedules([[there, large], [large_arrives, arrives]])
    assert finding.startswith("message 0 of rank 0 to rank 1: rank 0: send with rank 1 of float32")
    (finding,) = compare_schedules([[there, returns], [arrives]])
    assert "message 0 of rank 1 to rank 0: rank 1: nothing more; rank 0: recv" in finding


def test_an_all_to_all_may_be_uneven_but_must_fit() -> None:
    def shares(sent: tuple[int, ...], received: tuple[int, ...]) -> Entry:
        return replace(SUM, op="alltoall_base", sizes=(sent, received))

    assert compare_schedules([[shares((2, 1), (2, 0))], [shares((0, 1), (1, 1))]]) == []
    assert len(compare_schedules([[shares((2, 1), (2, 0))], [shares((0, 1), (2, 1))]])) == 1


def test_a_circle_of_ranks_that_wait_for_each_other_is_found() -> None:
    def pair(*ranks: int) -> Entry:
        return replace(SUM, ranks=ranks)

    ordered = [
        [pair(0, 1), pair(0, 2)],
        [pair(0, 1), pair(1, 3)],
        [pair(2, 3), pair(0, 2)],
        [pair(2, 3), pair(1, 3)],
    ]
    assert compare_schedules(ordered) == []
    ordered[1].reverse()
    ordered[2].reverse()
    (finding,) = compare_schedules(ordered)
    assert finding.startswith("these wait for each other: rank 0: allreduce")
