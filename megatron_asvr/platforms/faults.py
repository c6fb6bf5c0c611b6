"""Errors that are a node's and not the program's, and the nodes that a job shall not get again.

The script of a job keeps it off the hosts in the file ``exclude`` beside the word of how it ended
(launch/outcome.py). A node whose hardware says that it is broken goes there at once; one that may
only have been near an error, when that happens in a second start.
"""

import json
import os
import re
import socket
import traceback
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "ASVR_OUTCOME"  # a file in the job's folder, one a start
EXCLUDE = "exclude"
FAULTS = "faults.jsonl"
_STARTS = 2  # in which a node was suspected

# Numbers of NVIDIA's Xid errors: memory, NVLink, the bus, and the GPU's own processors.
_BROKEN = re.compile(
    r"uncorrectable (NVLink|ECC) error|uncorrectable ECC|hardware stack error|fallen off the bus"
    r"|\bXid\b.{0,40}?\b(48|62|63|64|74|79|92|94|95|119|120|140)\b",
    re.IGNORECASE,
)
# A device-side assert is missing on purpose: an index out of range fails on any node.
_SUSPECT = re.compile(
    r"CUDA error: (unspecified launch failure|an illegal instruction|invalid program counter"
    r"|unknown error|the launch timed out)"
    r"|unhandled (cuda|system) error|nccl(System|UnhandledCuda)Error"
    r"|call to ibv_\w+ failed|got completion .{0,60}with (error|status)",
    re.IGNORECASE,
)
_PEER = re.compile(r"remote peer ([\w.-]+)<\d+>")


@dataclass(frozen=True, slots=True)
class Fault:
    """What an error says of a node.

    Attributes:
        host: the node.
        why: the words that say so.
        sure: whether it is broken, or was only near.
    """

    host: str
    why: str
    sure: bool


def this_host() -> str:
    """This node's name, as the scheduler knows it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def classify(text: str) -> Fault | None:
    """Which node an error blames; None when it is the program's, or nobody can tell.

    Args:
        text: of the error, with those that caused it.
    """
    if found := _BROKEN.search(text):
        return Fault(this_host(), found[0], sure=True)
    if found := _PEER.search(text):  # NCCL says whose connection broke
        return Fault(found[1], found[0], sure=False)
    if found := _SUSPECT.search(text):
        return Fault(this_host(), found[0], sure=False)
    return None


def note_error(error: BaseException) -> Fault | None:
    """What an error says of a node, after that was remembered."""
    fault = classify("".join(traceback.format_exception(error)))
    if fault is not None:
        note(fault)
    return fault


def note(fault: Fault) -> None:
    """Remember a node's fault, and whether the job shall not get the node again.

    Nothing is done where no script of a job asks for it.
    """
    asked = os.environ.get(VARIABLE)
    if asked is None:
        return
    start = Path(asked)
    faults, exclude = start.with_name(FAULTS), start.with_name(EXCLUDE)
    line = {"host": fault.host, "why": fault.why, "sure": fault.sure, "start": start.name}
    _append(faults, json.dumps(line))
    known = [json.loads(text) for text in faults.read_text(encoding="utf-8").splitlines()]
    starts = {entry["start"] for entry in known if entry["host"] == fault.host}
    if fault.sure or len(starts) >= _STARTS:
        _append(exclude, fault.host)


def _append(path: Path, line: str) -> None:
    """Add one line at once, as several ranks may."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
