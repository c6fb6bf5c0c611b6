"""Whether a job's nodes can run together: asked of every rank before any work, in bounded time.

Rank 0 conducts. It writes one word after the other into the store in which ranks meet; every rank
does what the word says and answers there. So nothing waits for a rank that is gone: who has not
answered in time is named, and left out of what follows. Collectives run only between two nodes at a
time, in process groups of their own, on a thread that may hang.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import Platform, select

import torch
import torch.distributed as dist

from megatron_asvr.errors import AsvrError, LaunchError
from megatron_asvr.launch import slurm
from megatron_asvr.launch.findings import Limits, Report, Seen, judge
from megatron_asvr.launch.node import MARK, MIB, Facts, Wish, look, node_name, read_config
from megatron_asvr.launch.node import test_folder as shared_folder
from megatron_asvr.launch.rank import Place, leave_group, open_store, place, prepare_rank
from megatron_asvr.launch.smoke import SHORT
from megatron_asvr.launch.smoke import run as run_probe
from megatron_asvr.parallel.collectives import all_reduce_sum

TICKS = 3  # readings of all clocks; the one with the least delay counts
REPEATS = 3  # timed collectives of a pair
MAX_ALL_PAIRS = 32  # nodes; of more, each is measured with two neighbours only
GRACE_S = 5.0  # for an answer to arrive
_POLL_S = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A preflight.

    Attributes:
        wish: what to look at.
        limits: what is right.
        timeout_s: how long one rank may take for one answer.
        message_mib: bytes of a collective; default: 64 MiB on GPUs, 8 on CPUs.
        store: file in which local ranks meet; None: at the launcher's address.
        probes: of ``smoke.PROBES``, which every rank runs on its GPU.
    """

    wish: Wish = dataclasses.field(default_factory=Wish)
    limits: Limits = dataclasses.field(default_factory=Limits)
    timeout_s: float = 120.0
    message_mib: int | None = None
    store: str | None = None
    probes: tuple[str, ...] = SHORT


class Talk:
    """Rank 0's words to all ranks, and their answers, through a store."""

    def __init__(self, store: dist.Store, here: Place, timeout_s: float) -> None:
        self._store, self._here, self._timeout_s = store, here, timeout_s
        self._number = 0
        self.silent: dict[int, str] = {}  # what a rank did not answer to

    def ask(self, word: dict[str, Any], act: Callable[[dict[str, Any]], Any]) -> dict[int, Any]:
        """On rank 0: the answer of every rank that gives one in time, its own first."""
        number, self._number = self._number, self._number + 1
        until = time.monotonic() + self._timeout_s + GRACE_S
        self._store.set(f"word {number}", json.dumps(word))
        answers = {0: act(word)}
        waiting = [r for r in range(1, self._here.world_size) if r not in self.silent]
        while waiting:
            for rank in [r for r in waiting if self._store.check([f"answer {number} {r}"])]:
                answers[rank] = json.loads(self._store.get(f"answer {number} {rank}"))
                waiting.remove(rank)
            if waiting and time.monotonic() > until:
                break
            time.sleep(_POLL_S if waiting else 0)
        for rank in waiting:
            self.silent[rank] = f"did not answer to {word['do']!r} for {self._timeout_s:g} s"
        return answers

    def words(self) -> Iterator[dict[str, Any]]:
        """On another rank: every word of rank 0.

        Raises:
            LaunchError: rank 0 has gone, or is silent for longer than it may.
        """
        while True:
            try:
                limit = timedelta(seconds=2 * (self._timeout_s + GRACE_S))
                self._store.wait([f"word {self._number}"], limit)
                word = json.loads(self._store.get(f"word {self._number}"))
            except RuntimeError as error:
                raise LaunchError(
                    f"rank {self._here.rank} on {node_name()} hears nothing from rank 0 any more "
                    f"({str(error).partition(chr(10))[0]}); look at rank 0's node"
                ) from error
            yield word
            if word["do"] == "end":
                return

    def answer(self, value: Any) -> None:
        """On another rank: the answer to the last word."""
        self._store.set(f"answer {self._number} {self._here.rank}", json.dumps(value))
        self._number += 1


class Rank:
    """What a rank does at a word of rank 0."""

    def __init__(self, store: dist.Store, here: Place, settings: Settings) -> None:
        self._store, self._here, self._settings = store, here, settings
        self.hangs = False  # a collective of this rank never returned

    def act(self, word: dict[str, Any]) -> Any:
        """The answer to a word, something that JSON can hold."""
        if word["do"] == "look":
            facts = look(self._here, self._settings.wish, word["mark"])
            prepare_rank(self._here.local_rank)
            return dataclasses.asdict(facts)
        if word["do"] == "tell the time":
            return self.now()
        if word["do"] == "probe":
            return dataclasses.asdict(run_probe(word["name"], timeout_s=self._settings.timeout_s))
        if word["do"] == "measure":
            mine = [group for group in word["groups"] if self._here.rank in group]
            return self._measure(mine[0], f"round {word['round']}") if mine else None
        return None

    def now(self) -> float:
        """This node's clock, in seconds."""
        return time.time()

    def _measure(self, ranks: list[int], name: str) -> float | str:
        """GB/s of a collective of these ranks, or what went wrong."""
        if self.hangs:
            return "an earlier collective never returned"
        found: list[float | str] = []

        def call() -> None:
            try:
                found.append(self._bandwidth(ranks, name))
            except (RuntimeError, OSError, AsvrError) as error:
                found.append(str(error).partition("\n")[0])

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(self._settings.timeout_s)
        self.hangs = not found
        return found[0] if found else f"no collective in {self._settings.timeout_s:g} s"

    def _bandwidth(self, ranks: list[int], name: str) -> float:
        platform, _ = select()
        platform.set_device(self._here.local_rank)  # a thread begins with the first one
        group = f"{name} of {ranks[0]}"
        dist.init_process_group(
            platform.backend,
            store=dist.PrefixStore(group, self._store),
            rank=ranks.index(self._here.rank),
            world_size=len(ranks),
            timeout=timedelta(seconds=self._settings.timeout_s / 2),
            device_id=platform.group_device,
        )
        try:
            speed = all_reduce_gb_s(platform, len(ranks), self._settings.message_mib)
        except BaseException:
            dist.destroy_process_group()  # nobody may come to a last barrier
            raise
        leave_group()
        return speed


def all_reduce_gb_s(platform: Platform, number: int, mib: int | None = None) -> float:
    """GB/s that each rank sends in an all-reduce of the default group.

    Args:
        platform: of this rank.
        number: of its ranks.
        mib: of the message; default: 64 on GPUs, 8 on CPUs.

    Raises:
        LaunchError: a sum is wrong.
    """
    mib = mib or (64 if platform.num_gpus else 8)
    ones = torch.ones(mib * MIB // 4, device=platform.device)
    summed = all_reduce_sum(ones, group=dist.group.WORLD)  # connects, so is not timed
    if not bool((summed == number).all()):
        raise LaunchError("a sum came out wrong: the network or a GPU changes data")
    start = time.perf_counter()
    for _ in range(REPEATS):
        summed = all_reduce_sum(ones, group=dist.group.WORLD)
    float(summed[0])  # waits for the device
    seconds = (time.perf_counter() - start) / REPEATS
    # What each rank sends in an all-reduce of n: 2 (n-1)/n of the message.
    return 2 * (number - 1) / number * mib * MIB / seconds / 1e9


def preflight(settings: Settings, make: type[Rank] = Rank) -> tuple[Report, bool]:
    """The verdict, and whether a thread of this rank hangs. Call it on every rank.

    Args:
        settings: what to look at, the same on every rank.
        make: what answers rank 0's words.

    Raises:
        LaunchError: this rank does not reach rank 0, or rank 0 falls silent.
        ConfigError: on rank 0, the configuration cannot be read.
    """
    here = place()
    if here is None:
        raise LaunchError("this process is no rank of a job; call `asvr preflight`")
    if settings.store is not None:
        store: dist.Store = dist.FileStore(settings.store, -1)
    else:
        store = dist.PrefixStore("preflight", open_store(here, settings.timeout_s))
    talk, rank = Talk(store, here, settings.timeout_s), make(store, here, settings)
    if here.rank == 0:
        return _conduct(talk, rank, here, settings), rank.hangs
    for word in talk.words():
        talk.answer(rank.act(word))
        if word["do"] == "end":
            return Report(**word["report"]), rank.hangs
    raise AssertionError("words() ends with the word `end`")


def _conduct(talk: Talk, rank: Rank, here: Place, settings: Settings) -> Report:
    folder = shared_folder(settings.wish, read_config(settings.wish))
    mark, first = f".preflight-{uuid.uuid4().hex}", _first_missing(folder)
    problem = _write_mark(folder / mark, mark)
    try:
        looks = talk.ask({"do": "look", "mark": mark}, rank.act)
    finally:
        shutil.rmtree(first or folder / mark, ignore_errors=True)
    facts = {number: Facts(**found) for number, found in sorted(looks.items())}
    if problem is not None:
        facts[0].problems["folder"] = problem
    names = _names(facts, here.world_size)
    skews: dict[int, float] = {}
    for _ in range(TICKS):
        times = talk.ask({"do": "tell the time"}, rank.act)
        for number, found in times.items():
            skew = found - times[0]
            skews[number] = min(skew, skews.get(number, skew), key=abs)
    probes: dict[int, list[dict[str, Any]]] = {}
    for name in settings.probes:
        for number, result in talk.ask({"do": "probe", "name": name}, rank.act).items():
            probes.setdefault(number, []).append(result)
    pairs, left_out = _measure_pairs(talk, rank, names)
    seen = Seen(
        world=here.world_size,
        names=names,
        facts=facts,
        silent=talk.silent,
        skews_s=skews,
        pairs=pairs,
        left_out=left_out,
        probes=probes,
    )
    report = judge(seen, settings.limits)
    talk.ask({"do": "end", "report": dataclasses.asdict(report)}, rank.act)
    return report


def _first_missing(folder: Path) -> Path | None:
    """The uppermost of the folders that do not exist yet, which the test makes and removes."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    return missing[-1] if missing else None


def _write_mark(folder: Path, mark: str) -> str | None:
    """Write what the other ranks look for; why that failed."""
    try:
        folder.mkdir(parents=True)
        (folder / MARK).write_text(mark, encoding="utf-8")
    except OSError as error:
        return f"{folder.parent} cannot be written: {error.strerror or error}"
    return None


def _names(facts: dict[int, Facts], world: int) -> dict[int, str]:
    """The node of every rank; of a silent one, what Slurm's list of equally full nodes says."""
    names = {number: found.node for number, found in facts.items()}
    listed = os.environ.get("SLURM_JOB_NODELIST")
    if len(names) < world and listed is not None:
        with contextlib.suppress(LaunchError):  # a container may lack Slurm's commands
            hosts = slurm.call("scontrol", "show", "hostnames", listed).split()
            if world % len(hosts) == 0:
                full = world // len(hosts)
                names = {**{r: hosts[r // full] for r in range(world)}, **names}
    return names


def _measure_pairs(
    talk: Talk, rank: Rank, names: dict[int, str]
) -> tuple[dict[tuple[str, str], float | str], str]:
    """GB/s inside every node and between every two, or what went wrong; why pairs are missing."""
    found: dict[tuple[str, str], float | str] = {}
    members: dict[str, list[int]] = {}
    for number, name in sorted(names.items()):
        members.setdefault(name, []).append(number)
    nodes = list(members)
    inside = [(name, name) for name in nodes if len(members[name]) > 1]
    rounds, left_out = _rounds(nodes)
    for number, pairs in enumerate([inside, *rounds]):
        asked = {
            (a, b): sorted({*members[a], *members[b]})
            for a, b in pairs
            if not talk.silent.keys() & {*members[a], *members[b]}
        }
        if len(asked) < len(pairs):
            left_out = "pairs with a silent node were not measured"
        if not asked:
            continue
        word = {"do": "measure", "round": number, "groups": list(asked.values())}
        answers = talk.ask(word, rank.act)
        for pair, ranks in asked.items():
            values = [answers.get(r, "no answer") for r in ranks]
            wrong = [value for value in values if isinstance(value, str)]
            found[pair] = wrong[0] if wrong else min(values)
    return found, left_out


def _rounds(nodes: Sequence[str]) -> tuple[list[list[tuple[str, str]]], str]:
    """Pairs of nodes in rounds in which no node comes twice; all pairs, of many nodes some."""
    places: list[str | None] = [*nodes, None] if len(nodes) % 2 else [*nodes]
    half, rounds = len(places) // 2, []
    for _ in range(len(places) - 1):
        facing = zip(places[:half], reversed(places[half:]), strict=True)
        rounds.append([(a, b) for a, b in facing if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    if len(nodes) <= MAX_ALL_PAIRS:
        return rounds, ""
    some = f"{len(nodes)} nodes are too many for all pairs: each was measured with two others"
    return rounds[:2], some
