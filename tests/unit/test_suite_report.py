"""The table of a suite: averages, differences, and what it must not hide."""

import sys

import pytest

from megatron_asvr.cli.main import main
from megatron_asvr.errors import DataError
from megatron_asvr.hf.suite.report import check_comparable, plan_table, summary, table
from megatron_asvr.hf.suite.tasks import BENCHMARKS

FACTS = {"task": "t", "version": "0.0", "metric": "m", "judge": "rule", "questions": "abc"}


def task(score=None, **changes):
    found = FACTS | {"num_rows": 2, "num_rows_found": 3, "hub": "a/b:test"} | changes
    return found if score is None else found | {"score": score, "num_overlong": 0}


def report(*scores, **facts):
    """The first benchmarks with these scores; those of None and all others are missing."""
    tasks = {}
    for i, benchmark in enumerate(BENCHMARKS):
        score = scores[i] if i < len(scores) else None
        tasks[benchmark.name] = task(score, **({} if score is not None else {"missing": "gone"}))
    return summary(tasks, **facts)


def cells(lines, name):
    (line,) = (line for line in lines if line.startswith(f"| {name}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_complete_results_have_an_average_and_differences():
    mine, theirs = report(*range(14)), report(*range(1, 15))
    assert mine["average"] == 6.5
    assert not mine["partial"]
    lines = table(mine, theirs)
    assert cells(lines, "DocVQA") == [
        "DocVQA", "t", "0.0", "m", "rule", "2/3", "1.00", "2.00", "-1.00"
    ]  # fmt: skip
    assert cells(lines, "average of 14")[-3:] == ["6.50", "7.50", "-1.00"]
    assert "partial" not in "\n".join(lines)


def test_missing_benchmarks_are_named_and_make_the_average_partial():
    mine, theirs = report(40, 50), report(30, None, 20)
    assert mine["average"] == 45
    assert mine["partial"]
    lines = table(mine, theirs)
    assert cells(lines, "average")[0] == "average of 2 (partial)"
    # The baseline has one of the two: its average would be of something else.
    assert cells(lines, "average")[-3:] == ["45.00", "-", "-"]
    assert cells(lines, "OCRBench")[-4:] == ["missing", "-", "20.00", "-"]
    assert lines[-1] == "delta over the 1 benchmarks that both have: +10.00"
    assert sum(line.startswith("missing: ") for line in lines) == 12


def test_a_limit_and_overlong_questions_are_said():
    mine = report(*[1] * 14, limit=5)
    mine["tasks"]["GQA"]["num_overlong"] = 3
    text = "\n".join(table(mine))
    assert "average of 14 (partial)" in text
    assert "--limit 5" in text
    assert "3 questions are longer than the positions of the model" in text


@pytest.mark.parametrize("key", ["task", "version", "metric", "judge", "num_rows", "questions"])
def test_a_baseline_of_other_questions_or_rules_is_refused(key):
    mine, theirs = report(1, 2), report(1, 2)
    check_comparable(mine["tasks"], theirs, "b.json")
    theirs["tasks"]["DocVQA"][key] = "other"
    with pytest.raises(DataError, match=f"b.json .* DocVQA: {key} is 'other' there"):
        check_comparable(mine["tasks"], theirs, "b.json")
    with pytest.raises(DataError, match="no results of the suite"):
        check_comparable(mine["tasks"], {"accuracy": 1}, "b.json")


def test_the_plan_tells_rows_and_what_is_missing():
    lines = plan_table(report(1)["tasks"])
    assert cells(lines, "TextVQA") == ["TextVQA", "t", "0.0", "m", "rule", "a/b:test", "3"]
    assert cells(lines, "POPE")[-1] == "missing: gone"
    assert lines[-1] == "1 of 14 benchmarks have data"


def test_folders_and_names_are_unique():
    assert len({b.folder for b in BENCHMARKS}) == len({b.name for b in BENCHMARKS}) == 14


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "asvr14", "--dry-run"], "make setup-eval"),
        (["--suite", "asvr14"], "--out FOLDER"),
        (["--suite", "asvr14", "--images", "x"], "--images does not belong to --suite"),
        (["--suite", "asvr14", "parallel.tp=2"], "parallel.tp=2 does not belong to --suite"),
        (["--dry-run"], "--dry-run belongs to --suite asvr14"),
        (["--baseline", "x"], "--baseline belongs to --suite asvr14"),
        (["--batch", "2"], "--batch belongs to --suite asvr14"),
    ],
)
def test_mistakes_are_one_clear_line(arguments, words, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "megatron_asvr.hf.suite.lmms", raising=False)
    assert main(["eval", "model", "--data", "d", *arguments]) == 1
    assert words in capsys.readouterr().err
