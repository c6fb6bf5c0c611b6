"""What a rank asked of the others last, and which rank keeps them waiting.

torch's flight recorder notes every collective of every group, megatron-core's like ours, with the
source line that asked for it. It costs microseconds each, and can be read by another thread while
the rank is stuck in one. gloo's messages between two ranks are not in it; there only the source
line tells that a rank waits.
"""

import itertools
import os
import pickle
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

CALLS = 512  # that a rank remembers; reading them takes a millisecond or two each
_SIZE = "TORCH_FR_BUFFER_SIZE"
_TORCH = str(Path(torch.__file__).parent) + os.sep
_DISTRIBUTED = str(Path(dist.__file__).parent) + os.sep
_HIDDEN = (  # torch marks functions as deprecated by a wrapper of the second
    _TORCH,
    str(Path(_TORCH).with_name("typing_extensions.py")),
    str(Path(__file__).with_name("collectives.py")),
    __file__,
)
# A stage waits for a message's handle in megatron-core's own file, without a frame of torch.
_MESSAGES = os.path.join("megatron", "core", "pipeline_parallel", "p2p_communication.py")
_PACKAGES = ("megatron_asvr", "megatron")


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One collective that a rank has asked for.

    Attributes:
        group: torch's name of the group, the same on all its ranks.
        number: of the call among the group's.
        form: what it is: ``all_reduce [5] Long``.
        where: source line that asked for it.
        time_ns: when.
        pending: whether it is not over.
    """

    group: str
    number: int
    form: str
    where: str
    time_ns: int = 0
    pending: bool = False

    def __str__(self) -> str:
        return f"{self.form} (number {self.number} of group {self.group}) at {self.where}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """What a rank has to say when nothing goes on.

    Attributes:
        doing: what it is at: a step, say.
        where: source line that its main thread has come to.
        waits: whether that thread is in a call of torch's to other ranks.
        call: the collective that it waits in, if one is known.
        members: ranks of that collective's group.
        counts: collectives that it has asked for, by group.
        departure: how its last calls differ from those before, if they do.
    """

    doing: str
    where: str
    waits: bool
    call: Call | None = None
    members: Sequence[int] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    departure: str | None = None

    @classmethod
    def read(cls, tree: Mapping[str, Any]) -> "Words":
        """From what ``dataclasses.asdict`` made of them."""
        call = tree["call"] and Call(**tree["call"])
        return cls(**{**tree, "call": call})


def enable() -> None:
    """Make torch remember collectives; called before the first group of this process."""
    os.environ.setdefault(_SIZE, str(CALLS))


def last_words(doing: str, *, since_ns: int) -> Words:
    """What this rank's main thread waits for; called on another thread.

    Args:
        doing: see ``Words``.
        since_ns: when that began, in the clock of ``time.time_ns``.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    files = list(_files(frame))
    calls = _calls()
    call = next((call for call in calls if call.pending), None)
    return Words(
        doing=doing,
        where=_site(files),
        waits=call is not None or any(_is_waiting(file) for file, *_ in files),
        call=call,
        members=_members().get(call.group, ()) if call is not None else (),
        counts={call.group: call.number for call in calls},
        departure=departure(calls, since_ns=since_ns),
    )


def departure(calls: Sequence[Call], *, since_ns: int) -> str | None:
    """Where a rank did, the last time, what it had never done after the same call.

    Args:
        calls: of the rank, in order.
        since_ns: earlier ones are what it is compared with.
    """
    followers: dict[tuple[str, ...], dict[tuple[str, ...], Call]] = {}
    found = None
    for before, after in itertools.pairwise(calls):
        known = followers.setdefault(_kind(before), {})
        if known and _kind(after) not in known and after.time_ns >= since_ns:
            usual = " or ".join(f"{call.form} at {call.where}" for call in known.values())
            found = f"after {before} it came to {after}, where until now followed: {usual}"
        known[_kind(after)] = known.pop(_kind(after), after)
    return found


def culprits(words: Mapping[int, Words], world: int) -> list[int]:
    """The ranks that the others wait for; none when that cannot be told.

    Whoever says nothing, or waits for nobody, keeps the others waiting. When all wait for one
    another, the cause is who does something new, if not all do; else who has not come to
    a collective that others are in.

    Args:
        words: of the ranks that said something.
        world: number of ranks.
    """
    idle = [rank for rank in range(world) if rank not in words or not words[rank].waits]
    new = [rank for rank in words if words[rank].departure is not None]
    late = sorted({other for rank in words for other in missing(words, rank)})
    for found in (idle, new, late):
        if 0 < len(found) < world:
            return found
    return []


def missing(words: Mapping[int, Words], rank: int) -> list[int]:
    """Ranks that have not come to the collective that ``rank`` waits in, or came with another."""
    call = words[rank].call
    if call is None:
        return []
    return [other for other in words[rank].members if not _is_there(words.get(other), call)]


def _is_there(other: Words | None, call: Call) -> bool:
    if other is None or other.counts.get(call.group, 0) < call.number:
        return False
    theirs = other.call
    same_place = theirs is not None and (theirs.group, theirs.number) == (call.group, call.number)
    return not same_place or theirs.form == call.form


def _kind(call: Call) -> tuple[str, ...]:
    """What makes two calls the same: not their sizes, which depend on the data."""
    return call.group, call.form.partition(" ")[0], call.where


def _calls() -> list[Call]:
    """The collectives that torch remembers."""
    bindings = torch._C._distributed_c10d
    dump = bindings._dump_fr_trace
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dump = bindings._dump_nccl_trace
    entries = pickle.loads(dump())["entries"]
    return [_call(entry) for entry in sorted(entries, key=lambda entry: entry["record_id"])]


def _call(entry: Mapping[str, Any]) -> Call:
    op = entry["profiling_name"].partition(":")[2]
    sizes = ", ".join(map(str, entry["input_sizes"]))
    # Messages are numbered by each rank for itself: they are not compared.
    group = entry["process_group"][0] + (" (messages)" if entry["is_p2p"] else "")
    files = ((f["filename"], f["line"], f["name"]) for f in entry.get("frames", ()))
    return Call(
        group=group,
        number=entry["p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"],
        form=" ".join([op, sizes, *entry["input_dtypes"][:1]]),
        where=_site(files),
        time_ns=entry["time_created_ns"],
        pending=not entry["retired"] and entry["state"] != "completed",
    )


def _members() -> dict[str, list[int]]:
    """Ranks of every group, by its name."""
    known = dist.distributed_c10d._world
    return {name: sorted(known.pg_group_ranks[pg]) for pg, name in known.pg_names.items()}


def _files(frame: FrameType | None) -> Iterable[tuple[str, int, str]]:
    """File, line and function of a frame and those that called it, innermost first."""
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
        frame = frame.f_back


def _site(files: Iterable[tuple[str, int, str]]) -> str:
    """The innermost frame of ours or megatron-core's, or else the innermost that is not torch's."""
    seen = [found for found in files if not found[0].startswith(_HIDDEN)]
    own = (found for found in seen if _short(found[0]) != found[0])
    file, line, function = next(own, seen[0] if seen else ("unknown", 0, "unknown"))
    return f"{_short(file)}:{line} in {function}"


def _is_waiting(file: str) -> bool:
    """Whether a frame of this file means that a rank is in a call to others."""
    return file.startswith(_DISTRIBUTED) or file.endswith(_MESSAGES)


def _short(file: str) -> str:
    """The path from its package on."""
    for package in _PACKAGES:
        _, mark, rest = file.rpartition(f"{os.sep}{package}{os.sep}")
        if mark:
            return os.path.join(package, rest)
    return file
