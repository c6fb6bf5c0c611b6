"""What ends a run in which nothing goes on any more, after saying which rank is the cause.

Every rank has a thread that sees when a step takes too long. Then, or when another rank has seen
it, it leaves its last words (parallel/flight.py) in the folder of the attempt; the lowest rank that
is alive reads all of them, says who keeps the others waiting and at which line, and all ranks end
without an outcome, which a scheduler's script takes for a crash: it starts the job again.

The stack of every thread goes into the rank's log by a timer of faulthandler, which needs neither
Python's lock nor our thread. A rank that can say nothing, stopped say, or on a dead node, is named.
"""

import contextlib
import dataclasses
import faulthandler
import json
import logging
import os
import statistics
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_asvr.platforms import faults
from megatron_asvr.platforms.faults import Fault

from megatron_asvr.checkpoint.folder import write_durably
from megatron_asvr.config.schema import WatchdogConfig
from megatron_asvr.parallel import flight
from megatron_asvr.parallel.collectives import gather_objects
from megatron_asvr.parallel.flight import Words
from megatron_asvr.parallel.groups import Groups

STATUS = 5  # exit status of a rank that ends so
WORDS_S = 10.0  # to leave last words, or to say who is the cause
USUAL = 10  # usual steps that are never too long
_STEPS = 32  # whose median is a usual one

logger = logging.getLogger(__name__)


class Watchdog:
    """``with Watchdog(...) as dog:`` watches the steps inside ``with dog.step(n):``.

    What comes between steps, and the first step of a start, are not watched: there each collective
    has its own limit of time (launch/rank.py). All ranks take part.

    Args:
        settings: limits; nothing is watched with ``hang_s=0``.
        attempt: folder of this start.
        groups: process groups of the layout.

    Attributes:
        hosts: of all ranks.
    """

    def __init__(self, settings: WatchdogConfig, attempt: Path, *, groups: Groups) -> None:
        self._hang_s, self._rank = settings.hang_s, groups.rank
        self._words = attempt / "hang"
        self._log = attempt / f"rank_{groups.rank}.log"
        self.hosts = gather_objects(faults.this_host(), group=groups.world)
        self._poll_s = min(max(self._hang_s / 20, 0.1), 15.0)
        self._durations: deque[float] = deque(maxlen=_STEPS)
        self._doing, self._since_ns = "start", time.time_ns()
        self._deadline: float | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self._hang_s:
            self._stream = self._log.open("a", encoding="utf-8")
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._stream.close()
            with contextlib.suppress(OSError):
                if not self._log.stat().st_size:  # a launcher has the logs
                    self._log.unlink()

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Watch what is inside, unless it is the first step of this start."""
        started = time.monotonic()
        self._doing, self._since_ns = f"step {step}", time.time_ns()
        if self._thread is not None and self._durations:
            limit = max(self._hang_s, USUAL * statistics.median(self._durations))
            self._deadline = started + limit
            faulthandler.dump_traceback_later(limit, file=self._stream)
        try:
            yield
        finally:
            self._deadline = None
            if self._thread is not None:
                faulthandler.cancel_dump_traceback_later()
        # The first step prepares much; what it took says nothing of the others.
        self._durations.append(time.monotonic() - started if self._durations else 0.0)
        self._doing = f"what follows step {step}"

    def _watch(self) -> None:
        while not self._over.wait(self._poll_s):
            deadline = self._deadline
            is_late = deadline is not None and time.monotonic() > deadline
            if is_late or self._words.exists():
                self._end(is_late)

    def _end(self, is_late: bool) -> None:
        """Leave last words, hear the others', and end this process."""
        try:
            if not is_late:  # the timer has written the stacks of the others
                faulthandler.dump_traceback(file=self._stream)
            self._words.mkdir(exist_ok=True)
            mine = flight.last_words(self._doing, since_ns=self._since_ns)
            write_durably(self._of(self._rank), json.dumps(dataclasses.asdict(mine)).encode())
            words = self._gather()
            verdict = self._words / "verdict.txt"
            if min(words) == self._rank:
                text = explain(words, self.hosts)
                os.write(2, text.encode())  # no lock that the main thread may hold
                found = flight.culprits(words, len(self.hosts))
                for host in {self.hosts[rank] for rank in found}:
                    faults.note(Fault(host, f"hang in {self._doing}", sure=False))
                write_durably(verdict, text.encode())  # the others may end now
            else:
                self._wait(verdict.exists)
        except Exception:
            traceback.print_exc(file=self._stream)
        finally:
            os._exit(STATUS)

    def _of(self, rank: int) -> Path:
        return self._words / f"rank_{rank}.json"

    def _gather(self) -> dict[int, Words]:
        """What every rank has to say, as far as it does so in time."""
        ranks = range(len(self.hosts))
        self._wait(lambda: all(self._of(rank).exists() for rank in ranks))
        there = [rank for rank in ranks if self._of(rank).exists()]
        return {rank: Words.read(json.loads(self._of(rank).read_text())) for rank in there}

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 2 * self._poll_s + WORDS_S
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.1)


def explain(words: dict[int, Words], hosts: Sequence[str]) -> str:
    """Who keeps whom waiting, the cause first.

    Args:
        words: of the ranks that said something.
        hosts: of all ranks.
    """
    found = flight.culprits(words, len(hosts))
    doing = ", ".join(sorted({said.doing for said in words.values()}))
    lines = [f"no progress in {doing}; this start ends here, to begin again from a checkpoint"]
    lines += [f"culprit: {_told(words, rank, hosts)}" for rank in found]
    if not found:
        lines.append("no rank is the cause: all wait, and for one another")
    others = [rank for rank in range(len(hosts)) if rank not in found]
    lines += [_told(words, rank, hosts) for rank in others]
    return "\n".join(lines) + "\n"


def _told(words: dict[int, Words], rank: int, hosts: Sequence[str]) -> str:
    """What is known of one rank."""
    who = f"rank {rank} on {hosts[rank]}"
    if rank not in words:
        return f"{who} says nothing: it is stopped, dead, or cut off from this folder"
    mine = words[rank]
    if not mine.waits:
        return f"{who} is in no collective, but at {mine.where} ({mine.doing})"
    text = f"{who} is at {mine.where} ({mine.doing})"
    if mine.call is not None:
        text = f"{who} waits in {mine.call}"
        late = flight.missing(words, rank)
        if late:
            text += f" for rank{'s' * (len(late) > 1)} {', '.join(map(str, late))}"
    return f"{text}; {mine.departure}" if mine.departure else text
