"""House rules that no linter knows: ASCII, short files, no prints, no loose ends."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [
    path
    for folder in ("megatron_asvr", "tools", "examples", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
TEXTS = [
    *SCRIPTS,
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "megatron_asvr").rglob("*.yaml")),
    *sorted((ROOT / "examples").rglob("*.yaml")),
    *sorted((ROOT / "examples").rglob("*.md")),
    ROOT / "Makefile",
    ROOT / "pyproject.toml",
    ROOT / "setup.py",
    ROOT / ".ci" / "run",
]
MAX_LINES = 600

# Brackets keep each pattern from matching its own line.
LOOSE_ENDS = re.compile(r"\b(TOD[O]|FIXM[E]|XX[X])\b")
NOT_FOR_READERS = re.compile(
    r"/wor[k]/|\.\./share[d]|share[d]/(facts|lab|oracle)|contrac[t]\.md"
    r"|pypi\.or[g]|pythonhoste[d]|deb\.debia[n]|npmj[s]"
)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def matches(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{name(path)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(re.compile(r"[^\x00-\x7f]"), id="ascii"),
        pytest.param(LOOSE_ENDS, id="loose_ends"),
        pytest.param(NOT_FOR_READERS, id="places_a_reader_does_not_have"),
    ],
)
def test_no_text_contains(pattern):
    found = matches(pattern, TEXTS)
    assert not found, "\n".join(found)


def test_files_can_be_read_in_one_sitting():
    lengths = {name(path): len(path.read_text().splitlines()) for path in SCRIPTS}
    long = {path: lines for path, lines in lengths.items() if lines > MAX_LINES}
    assert not long


def test_only_commands_print():
    wrong = [
        f"{name(path)}:{node.lineno}"
        for path in sorted((ROOT / "megatron_asvr").rglob("*.py"))
        if "cli" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert not wrong


def test_world_tests_are_marked():
    folder = ROOT / "tests" / "world"
    unmarked = [
        name(path)
        for path in sorted(folder.glob("test_*.py"))
        if not re.search(r"pytest\.mark\.world\b", path.read_text(encoding="utf-8"))
    ]
    assert not unmarked
