"""What the facts of all ranks come to: one row a check, and the nodes at fault by name."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_asvr.launch.node import Facts

State = Literal["ok", "FAILED", "slow", "not checked"]
SLOW = 0.5  # of the median pair's bandwidth


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is still right.

    Attributes:
        skew_s: between a node's clock and that of rank 0's.
        min_gb_s: of a collective between two nodes; 0: no limit.
    """

    skew_s: float = 1.0
    min_gb_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """Everything that was learned.

    Attributes:
        world: number of ranks.
        names: node of each rank, as far as known.
        facts: by rank.
        silent: what a rank did not answer to, by rank.
        skews_s: of each rank's clock against rank 0's.
        pairs: GB/s of two nodes, or why there is none; of a node with itself, between its ranks.
        left_out: why pairs are missing; empty when none is.
        probes: by rank, what probes found of its GPU (fields of ``smoke.Result``).
    """

    world: int
    names: Mapping[int, str]
    facts: Mapping[int, Facts]
    silent: Mapping[int, str]
    skews_s: Mapping[int, float]
    pairs: Mapping[tuple[str, str], float | str]
    left_out: str = ""
    probes: Mapping[int, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


@dataclass(slots=True)
class Report:
    """The verdict.

    Attributes:
        rows: check, state and what was seen, in order.
        wrong: a node (or two), the check it failed and how.
        numbers: what was measured, by node or pair of nodes.
    """

    rows: list[tuple[str, State, str]] = field(default_factory=list)
    wrong: list[dict[str, str]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether a run may start."""
        return not self.wrong

    def add(self, check: str, text: str, wrong: Mapping[str, str], state: State = "ok") -> None:
        """Add a row.

        Args:
            check: its name.
            text: what was seen.
            wrong: what is wrong with each node at fault; empty when nothing is.
            state: of a row without fault.
        """
        self.wrong += [{"node": node, "check": check, "text": why} for node, why in wrong.items()]
        shown = "; ".join(f"{node}: {why}" for node, why in wrong.items())
        self.rows.append((check, "FAILED" if wrong else state, shown or text))


def judge(seen: Seen, limits: Limits) -> Report:
    """The verdict on everything that was learned."""
    report, nodes = Report(), sorted(set(seen.names.values()))
    wrong = {_node(seen, rank): f"rank {rank} {why}" for rank, why in seen.silent.items()}
    answered = seen.world - len(seen.silent)
    report.add("ranks", f"{answered} of {seen.world} answered, on {len(nodes)} nodes", wrong)
    _judge_software(report, seen)
    _judge_gpus(report, seen)
    _judge_probes(report, seen)
    largest = max(seen.skews_s, key=lambda rank: abs(seen.skews_s[rank]), default=0)
    skew = seen.skews_s.get(largest, 0.0)
    report.add(
        "clock",
        f"at most {abs(skew):.3f} s apart",
        {
            _node(seen, rank): f"{s:+.3f} s from {_node(seen, 0)}, allowed are {limits.skew_s:g}"
            for rank, s in seen.skews_s.items()
            if abs(s) > limits.skew_s
        },
    )
    speeds = [f.write_mb_s for f in seen.facts.values() if f.write_mb_s is not None]
    folder = seen.facts[0].folder if 0 in seen.facts else ""
    spread = f"{min(speeds):.0f} to {max(speeds):.0f} MB/s a node" if speeds else "nothing"
    report.add("storage", f"{folder}: written at {spread}", _problems(seen, "folder"))
    _judge_data(report, seen)
    _judge_pairs(report, seen, limits)
    written = {f.node: f.write_mb_s for f in seen.facts.values() if f.write_mb_s is not None}
    report.numbers = {
        "written_mb_s": written,
        "clock_skew_s": {_node(seen, rank): skew for rank, skew in seen.skews_s.items()},
        "pairs_gb_s": [[*pair, value] for pair, value in seen.pairs.items()],
    }
    return report


def _node(seen: Seen, rank: int) -> str:
    return seen.names.get(rank, f"the node of rank {rank}")


def _problems(seen: Seen, check: str) -> dict[str, str]:
    """What each node found wrong by itself."""
    found = [f for f in seen.facts.values() if check in f.problems]
    return {f.node: f.problems[check] for f in reversed(found)}  # the first rank's stays


def _odd(seen: Seen, of: Callable[[Facts], Any]) -> dict[int, tuple[Any, Any]]:
    """Ranks that differ from most others: what they have and what most have; rank 0 breaks ties."""
    values = {rank: of(facts) for rank, facts in sorted(seen.facts.items())}
    if not values:
        return {}
    ((common, _),) = Counter(values.values()).most_common(1)
    return {rank: (value, common) for rank, value in values.items() if value != common}


def _judge_software(report: Report, seen: Seen) -> None:
    wrong: dict[str, str] = {}
    for what, of in (
        ("Python", lambda f: f.python),
        ("this package's code is", lambda f: f.code),
    ):
        for rank, (mine, others) in _odd(seen, of).items():
            wrong.setdefault(_node(seen, rank), f"{what} {mine}, elsewhere {others} (rank {rank})")
    packages = _odd(seen, lambda f: tuple(f.packages.items()))
    for rank, (mine, others) in packages.items():
        here, there = dict(mine), dict(others)
        names = [n for n in sorted({*here, *there}) if here.get(n) != there.get(n)]
        told = [f"{n} {here.get(n, 'missing')}, elsewhere {there.get(n, 'missing')}" for n in names]
        more = f" and {len(told) - 3} more" if len(told) > 3 else ""
        wrong.setdefault(_node(seen, rank), f"{'; '.join(told[:3])}{more} (rank {rank})")
    first = next(iter(seen.facts.values()), None)
    text = f"Python {first.python}, {len(first.packages)} packages" if first else "nothing"
    report.add("software", f"{text}, the same everywhere", wrong)


def _judge_gpus(report: Report, seen: Seen) -> None:
    wrong = _problems(seen, "gpus")
    for rank, (mine, others) in _odd(seen, lambda f: tuple(f.gpus)).items():
        wrong.setdefault(_node(seen, rank), f"{_count(mine)}, elsewhere {_count(others)}")
    gpus = next((f.gpus for f in seen.facts.values()), [])
    if gpus:
        report.add("gpus", f"{_count(gpus)} on every node, idle", wrong)
    else:
        report.add("gpus", "no node has one: ranks run on the CPU", wrong, state="not checked")


def _judge_probes(report: Report, seen: Seen) -> None:
    found = [(rank, result) for rank, results in seen.probes.items() for result in results]
    wrong = {
        _node(seen, rank): f"{r['probe']} (rank {rank}): {r['measured']}; next: {r['action']}"
        for rank, r in reversed(found)  # the first one's stays
        if r["state"] == "FAIL"
    }
    passed = Counter(r["probe"] for _, r in found if r["state"] == "PASS")
    left_out: dict[str, list[str]] = {}
    for name, why in {
        r["probe"]: r["measured"] for _, r in found if r["state"] == "NOT RUN"
    }.items():
        left_out.setdefault(why, []).append(name)
    texts = [f"{name} on {number} ranks" for name, number in passed.items()]
    texts += [f"{', '.join(names)} NOT RUN: {why}" for why, names in left_out.items()]
    text = "; ".join(texts) or "not asked for"
    report.add("probes", text, wrong, state="ok" if passed else "not checked")


def _count(names: Sequence[str]) -> str:
    kinds = Counter(names)
    return ", ".join(f"{number} {name}" for name, number in kinds.items()) or "no GPU"


def _judge_data(report: Report, seen: Seen) -> None:
    wrong = _problems(seen, "data")
    read = {rank: f for rank, f in seen.facts.items() if f.files is not None}
    if not read and not wrong:
        report.add("data", "no configuration was given", {}, state="not checked")
        return
    for rank, (mine, others) in _odd(seen, lambda f: tuple(f.files or ())).items():
        if mine and others:
            text = f"{mine[0]} files of {mine[1]} bytes, elsewhere {others[0]} of {others[1]}"
            wrong.setdefault(_node(seen, rank), text)
    files = next(iter(read.values())).files if read else None
    number, size = files or (0, 0)
    report.add("data", f"{number} files, {size / 1e9:.3f} GB, readable everywhere", wrong)


def _judge_pairs(report: Report, seen: Seen, limits: Limits) -> None:
    """A node that fails with everybody is at fault; of a single pair it can be either."""
    speeds = {pair: value for pair, value in seen.pairs.items() if isinstance(value, float)}
    failed = {pair: value for pair, value in seen.pairs.items() if isinstance(value, str)}
    if not seen.pairs:
        why = seen.left_out or "one rank has nobody to talk to"
        report.add("bandwidth", why, {}, state="not checked")
        return
    wrong: dict[str, str] = {}
    reached = {node for pair in speeds for node in pair}
    for pair, why in failed.items():
        culprits = [node for node in dict.fromkeys(pair) if node not in reached] or list(pair)
        other = {pair[0]: pair[1], pair[1]: pair[0]}
        if len(culprits) == 1 or pair[0] == pair[1]:
            wrong.setdefault(culprits[0], f"with {other[culprits[0]]}: {why}")
        else:
            wrong.setdefault(" - ".join(culprits), why)
    if limits.min_gb_s:
        for (a, b), speed in speeds.items():
            if speed < limits.min_gb_s:
                text = f"{speed:.3g} GB/s, wanted are {limits.min_gb_s:g}"
                wrong.setdefault(f"{a} - {b}" if a != b else a, text)
    between = {pair: speed for pair, speed in speeds.items() if pair[0] != pair[1]} or speeds
    text, state = "no pair", "ok"
    if between:
        middle = statistics.median(between.values())
        slowest = min(between, key=lambda pair: between[pair])
        text = (
            f"{len(between)} pairs, {min(between.values()):.3g} to {max(between.values()):.3g} "
            f"GB/s, the slowest {' - '.join(dict.fromkeys(slowest))}"
        )
        lame = [n for n in sorted(reached) if _best(n, between) < SLOW * middle]
        if lame:
            text, state = f"{text}; slow with every other: {', '.join(lame)}", "slow"
    text += f"; {seen.left_out}" if seen.left_out else ""
    report.add("bandwidth", text, wrong, state=state)  # type: ignore[arg-type]


def _best(node: str, speeds: Mapping[tuple[str, str], float]) -> float:
    return max((speed for pair, speed in speeds.items() if node in pair), default=float("inf"))
