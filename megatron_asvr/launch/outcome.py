"""How a command under a scheduler ended, for the script that started it.

An exit status cannot tell that: a launcher ends the other ranks as soon as one is gone, and reports
theirs. So the first rank that knows writes a word into the file that the script names.
"""

import contextlib
import os
from collections.abc import Iterable

VARIABLE = "ASVR_OUTCOME"
EXCLUDE = "ASVR_EXCLUDE"
FINISHED = "finished"
STOPPED = "stopped"  # saved, and wants to go on
REFUSED = "refused"  # an error that would come again


def note(outcome: str, why: str = "") -> None:
    """Leave word, unless nobody asked or another rank was first."""
    path = os.environ.get(VARIABLE)
    if path is None:
        return
    with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as stream:
        stream.write(f"{outcome} {why}".strip().partition("\n")[0] + "\n")


def exclude(nodes: Iterable[str]) -> None:
    """Name nodes that this job had better not get again, unless nobody asked."""
    path = os.environ.get(EXCLUDE)
    if path is None:
        return
    with open(path, "a", encoding="utf-8") as stream:
        stream.writelines(f"{node}\n" for node in nodes)
