"""The results of a suite: one table, with the column of a baseline and the differences."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_asvr.errors import DataError
from megatron_asvr.hf.suite.tasks import BENCHMARKS, SUITE

# What has to be equal for a difference of scores to mean something.
_COMPARED = ("task", "version", "metric", "judge", "num_rows", "questions")
_HEAD = ("benchmark", "task", "version", "metric", "judge", "rows", "score", "baseline", "delta")


def summary(tasks: Mapping[str, Mapping[str, Any]], **facts: Any) -> dict[str, Any]:
    """The report of a suite as JSON.

    Args:
        tasks: by name of the benchmark; those without a score have the reason as ``missing``.
        **facts: about the model and the run.
    """
    scores = [task["score"] for task in tasks.values() if "score" in task]
    return {
        "suite": SUITE,
        **facts,
        "num_scored": len(scores),
        "partial": len(scores) < len(BENCHMARKS) or facts.get("limit") is not None,
        "average": sum(scores) / len(scores) if scores else None,
        "tasks": dict(tasks),
    }


def json_bytes(value: Any) -> bytes:
    """``value`` as the text of a JSON file."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read(path: str | Path) -> dict[str, Any]:
    """The JSON object in ``path``, results or a record of answers.

    Raises:
        DataError: the file is missing or something else.
    """
    try:
        found = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as e:
        raise DataError(f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(found, dict):
        raise DataError(f"{path} holds a {type(found).__name__}; wanted a JSON object")
    return found


def check_comparable(
    tasks: Mapping[str, Mapping[str, Any]], baseline: Mapping[str, Any], where: str
) -> None:
    """Return when the baseline was asked the same questions and judged by the same rules.

    Args:
        tasks: of this run, without scores yet.
        baseline: from ``read_baseline``.
        where: its file.

    Raises:
        DataError: it was not; both values are named.
    """
    if baseline.get("suite") != SUITE or not isinstance(baseline.get("tasks"), dict):
        raise DataError(f"{where} holds no results of the suite {SUITE}")
    wrong = []
    for name, task in tasks.items():
        other = baseline["tasks"].get(name, {})
        if "score" in other and "missing" not in task:
            wrong += [
                f"{name}: {key} is {other.get(key)!r} there and {task[key]!r} here"
                for key in _COMPARED
                if other.get(key) != task[key]
            ]
    if wrong:
        raise DataError(
            f"{where} is no baseline for this run: {'; '.join(wrong[:3])}; {len(wrong)} in "
            "all; run the baseline again with the same data and --limit"
        )


def table(report: Mapping[str, Any], baseline: Mapping[str, Any] | None = None) -> list[str]:
    """Lines of a Markdown table with every benchmark, and what the average leaves out."""
    others = baseline["tasks"] if baseline else {}
    rows = [
        _HEAD,
        *(_row(name, task, others.get(name, {})) for name, task in report["tasks"].items()),
    ]
    scored = {name for name, task in report["tasks"].items() if "score" in task}
    common = sorted(scored & {name for name, task in others.items() if "score" in task})
    mine = _mean(report["tasks"], scored)
    theirs = _mean(others, common) if len(common) == len(scored) else None
    label = f"average of {len(scored)}" + (" (partial)" if report["partial"] else "")
    rows.append((label, *[""] * 5, *_numbers(mine, theirs)))
    lines = _aligned(rows)
    lines += _notes(report)
    if common and len(common) < len(scored):
        delta = _mean(report["tasks"], common) - _mean(others, common)
        lines.append(f"delta over the {len(common)} benchmarks that both have: {delta:+.2f}")
    return lines


def plan_table(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table with every benchmark: its task and whether its data is there."""
    rows = [("benchmark", "task", "version", "metric", "judge", "data set", "rows")]
    for name, task in tasks.items():
        rows_there = f"missing: {task['missing']}" if "missing" in task else task["num_rows_found"]
        keys = ("task", "version", "metric", "judge", "hub")
        rows.append((name, *(task[key] for key in keys), str(rows_there)))
    missing = sum("missing" in task for task in tasks.values())
    return [*_aligned(rows), f"{len(tasks) - missing} of {len(tasks)} benchmarks have data"]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    rows = [rows[0], ["-" * len(head) for head in rows[0]], *rows[1:]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]


def _row(name: str, task: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    facts = (name, task["task"], task["version"], task["metric"], task["judge"])
    if "missing" in task:
        return (*facts, "missing", "-", _number(other.get("score")), "-")
    rows = f"{task['num_rows']}/{task['num_rows_found']}"
    return (*facts, rows, *_numbers(task.get("score"), other.get("score")))


def _numbers(mine: float | None, theirs: float | None) -> tuple[str, str, str]:
    delta = None if mine is None or theirs is None else mine - theirs
    return _number(mine), _number(theirs), "-" if delta is None else f"{delta:+.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mean(tasks: Mapping[str, Mapping[str, Any]], names: Sequence[str] | set[str]) -> float | None:
    return sum(tasks[name]["score"] for name in names) / len(names) if names else None


def _notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    tasks = report["tasks"]
    notes = [f"missing: {name}: {t['missing']}" for name, t in tasks.items() if "missing" in t]
    overlong = sum(task.get("num_overlong", 0) for task in tasks.values())
    if overlong:
        notes.append(f"{overlong} questions are longer than the positions of the model")
    if report.get("limit") is not None:
        notes.append(f"--limit {report['limit']}: no benchmark is complete")
    return notes
