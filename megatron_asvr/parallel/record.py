"""What a rank asks of the others: recorded while it runs, compared over ranks afterwards.

Every collective, megatron-core's and ours, forward and backward, object and point-to-point, ends in
an operator of torch's ``c10d`` namespace, so one dispatch mode sees them all. When the members of
each group issue the same sequence, and what one rank sends is what the other receives, no rank
waits for something that never comes. gloo runs schedules that NCCL hangs on, hence the comparison.
"""

import sys
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_HIDDEN = ("torch", "typing_extensions", __name__, "megatron_asvr.parallel.collectives")
_POINT_TO_POINT = ("send", "recv")
_ROOTED = {"broadcast": 2, "gather": 3, "scatter": 3, "reduce": 3}  # argument with the root


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One collective, or one end of a message.

    Attributes:
        op: c10d's name: ``allreduce``, ``_allgather_base``, ``send``, ...
        ranks: the group, as ranks of the world.
        sizes: shapes of the tensors that are sent and received; of an all-to-all two rows, the
            elements for each rank of the group and those from it.
        dtype: of the tensors.
        peer: rank of the world at the other end, or the root.
        where: function that asked for it.
    """

    op: str
    ranks: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...] = ()
    dtype: str = ""
    peer: int | None = None
    where: str = field(default="", compare=False)

    def __str__(self) -> str:
        peer = "" if self.peer is None else f" with rank {self.peer}"
        return f"{self.op}{peer} of {self.dtype} {list(self.sizes)} in {self.where or 'unknown'}"


class Recorder(TorchDispatchMode):
    """Records in ``entries`` what this rank asks of the others inside ``with Recorder() as r:``."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d":
            self.entries.append(_entry(func.__name__.partition(".")[0].rstrip("_"), args))
        return func(*args, **(kwargs or {}))


def compare_schedules(by_rank: Sequence[Sequence[Entry]]) -> list[str]:
    """What is wrong with the schedules: the first difference in each group and between two ranks.

    Without any, ranks can still wait in a circle, one for another group's collective each; then
    that is the finding. (Sends and receives are posted, so they wait for nothing here.)

    Args:
        by_rank: entries of every rank of the world, in the order they were issued.
    """
    groups: dict[tuple[int, ...], dict[int, list[Entry]]] = {}
    sent, received = defaultdict(list), defaultdict(list)
    for rank, entries in enumerate(by_rank):
        for entry in entries:
            if entry.op == "send":
                sent[rank, entry.peer, entry.ranks].append(entry)
            elif entry.op == "recv":
                received[entry.peer, rank, entry.ranks].append(entry)
            else:
                members = groups.setdefault(entry.ranks, {member: [] for member in entry.ranks})
                members[rank].append(entry)
    found = [_first_difference(members) for _, members in sorted(groups.items())]
    pairs = sorted({*sent, *received})
    found += [_first_mismatch(*pair[:2], sent[pair], received[pair]) for pair in pairs]
    return [finding for finding in found if finding] or _circle(by_rank)


def _first_difference(members: Mapping[int, Sequence[Entry]]) -> str:
    """The first place where the members of a group do not issue the same collective."""
    for position, entries in enumerate(zip_longest(*members.values())):
        forms = {entry and _common(entry) for entry in entries}
        if len(forms) > 1 or not _fits(entries):
            did = defaultdict(list)
            for rank, entry in zip(members, entries, strict=True):
                did[str(entry) if entry else "nothing more"].append(rank)
            text = "; ".join(f"{_name(ranks)}: {what}" for what, ranks in did.items())
            return f"group {list(members)}, collective {position}: {text}"
    return ""


def _first_mismatch(
    source: int, target: int, sent: Sequence[Entry], received: Sequence[Entry]
) -> str:
    """The first message between two ranks that is not received as it was sent."""
    for position, (send, recv) in enumerate(zip_longest(sent, received)):
        if send and recv and (send.sizes, send.dtype) == (recv.sizes, recv.dtype):
            continue
        return (
            f"message {position} of rank {source} to rank {target}: rank {source}: "
            f"{send or 'nothing more'}; rank {target}: {recv or 'nothing more'}"
        )
    return ""


def _circle(by_rank: Sequence[Sequence[Entry]]) -> list[str]:
    """The ranks that wait for each other, when the members of each group agree."""
    queues = [
        deque(entry for entry in entries if entry.op not in _POINT_TO_POINT) for entries in by_rank
    ]
    ready = [queue[0].ranks for queue in queues if queue]
    while ready:
        group = ready.pop()
        while all(queues[rank] and queues[rank][0].ranks == group for rank in group):
            for rank in group:
                queues[rank].popleft()
            ready += [queues[rank][0].ranks for rank in group if queues[rank]]
    stuck = [f"rank {rank}: {queue[0]}" for rank, queue in enumerate(queues) if queue]
    return [f"these wait for each other: {'; '.join(stuck)}"] if stuck else []


def _common(entry: Entry) -> Entry:
    """What must be equal on every member: an all-to-all may send each rank another number."""
    return replace(entry, sizes=()) if entry.op.startswith("alltoall") else entry


def _fits(entries: Sequence[Entry]) -> bool:
    """Whether, in an all-to-all, every rank receives from each what that one sends to it."""
    if not entries[0].op.startswith("alltoall"):
        return True
    sent, received = zip(*(entry.sizes for entry in entries), strict=True)
    return list(zip(*sent, strict=True)) == list(received)


def _name(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _entry(op: str, args: Sequence[Any]) -> Entry:
    """The entry of one call of ``torch.ops.c10d.<op>``."""
    # Reduction operators are script objects too, but not of this class: the group comes first.
    boxed = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
    ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(boxed)))
    tensors = list(_tensors(args))
    peer = None
    if op in _POINT_TO_POINT or op in _ROOTED:
        peer = ranks[args[_ROOTED.get(op, 2)]]
    if op in ("gather", "scatter"):  # the full list exists on the root only
        tensors = list(_tensors(args[op == "gather"]))
    sizes = tuple(tuple(x.shape) for x in tensors)
    if op == "alltoall":
        sizes = tuple(tuple(x.numel() for x in args[side]) for side in (1, 0))
    elif op == "alltoall_base":
        sizes = (_shares(args[1], args[4], len(ranks)), _shares(args[0], args[3], len(ranks)))
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
    return Entry(op=op, ranks=ranks, sizes=sizes, dtype=dtype, peer=peer, where=_caller())


def _tensors(args: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors in nested lists of arguments."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


def _shares(x: Tensor, rows: Sequence[int], world: int) -> tuple[int, ...]:
    """Elements of ``x`` for each rank, which gets ``rows`` of it, or an equal share."""
    if not rows:
        return (x.numel() // world,) * world
    return tuple(n * x[:1].numel() for n in rows)


def _caller() -> str:
    """Module and function of the innermost frame that is neither torch's nor this plumbing."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(_HIDDEN):
            return f"{module}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return ""
