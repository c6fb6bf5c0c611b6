"""Everything the documents tell a reader to type, open or set exists."""

import dataclasses
import re
import shlex
from pathlib import Path

from megatron_asvr.platforms.shims import SHIMS

import pytest

from megatron_asvr.cli.main import build_parser, parse
from megatron_asvr.config.load import flatten
from megatron_asvr.config.schema import Config, SourceConfig
from tools.config_reference import PAGE, page

ROOT = Path(__file__).resolve().parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKE_TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
SETTINGS = {f.name for f in dataclasses.fields(Config)}

# Beginnings of paths that a run or a set-up makes; they are not in the repository.
MADE = ("runs/", "checkpoints/", "frozen/", "attempts/", ".venv")
FILE_TYPES = (".py", ".md", ".yaml", ".toml")
FILES_OF_RUNS = {"config.yaml", "report.md"}


def commands(text: str) -> list[str]:
    """The commands of a document's shell blocks, without comments, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def parse_asvr(arguments: list[str]) -> None:
    """Fail unless `asvr` accepts the arguments; ``--help`` counts as accepted."""
    try:
        parse(arguments)
    except SystemExit as stop:
        if stop.code != 0:
            pytest.fail(f"asvr {shlex.join(arguments)} is refused")


def each_doc(function):
    return pytest.mark.parametrize("doc", DOCS, ids=lambda doc: doc.name)(function)


@each_doc
def test_commands_of_shell_blocks_exist(doc):
    for command in commands(doc.read_text(encoding="utf-8")):
        program, *arguments = shlex.split(command)
        if program == "make":
            targets = [a for a in arguments if "=" not in a]
            assert set(targets) <= MAKE_TARGETS, command
        elif program == "asvr":
            parse_asvr(arguments)
        else:
            assert command == "pip install .", command  # run by tests/unit/test_packaging.py


@each_doc
def test_asvr_commands_of_other_shell_blocks_exist(doc):
    """Those that need a cluster or files of the reader, behind `srun` or alone."""
    blocks = re.findall(r"```sh\n(.*?)```", doc.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        if "asvr" in words:
            parse_asvr(words[words.index("asvr") + 1 :])


@each_doc
def test_make_targets_of_shell_blocks_are_run_by_ci(doc):
    """Or in their short form. `asvr` commands are run by tests/world/test_commands.py."""
    ran = set(re.findall(r"^step ([a-z0-9-]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    for command in commands(doc.read_text(encoding="utf-8")):
        program, *arguments = shlex.split(command)
        if program == "make":
            (target,) = (a for a in arguments if "=" not in a)
            assert {target, f"{target}-short"} & ran, command


@each_doc
def test_commands_in_sentences_exist(doc):
    for code in inline_code(doc.read_text(encoding="utf-8")):
        program, *arguments = code.split()
        if program == "make" and arguments:
            assert arguments[0] in MAKE_TARGETS, code
        elif program == "asvr":
            words = [a for a in arguments if re.fullmatch(r"[a-z]+", a)]
            parse_asvr([*words, "--help"])


@each_doc
def test_paths_exist(doc):
    text = doc.read_text(encoding="utf-8")
    for code in inline_code(text):
        looks_like_path = re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", code) and (
            "/" in code or code.endswith(FILE_TYPES)
        )
        if looks_like_path and not code.startswith(MADE) and code not in FILES_OF_RUNS:
            assert (ROOT / code).exists(), code
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (doc.parent / target).exists(), target


@each_doc
def test_settings_exist(doc):
    """Names such as ``loss.mode``, in sentences and as ``a.b=c`` of commands."""
    text = doc.read_text(encoding="utf-8")
    known = {*flatten(Config())}
    for key in ("train", "eval"):
        known |= {f"data.{key}[].{f.name}" for f in dataclasses.fields(SourceConfig)}
    groups = {name.rsplit(".", 1)[0] for name in known}
    typed = (word for command in commands(text) for word in shlex.split(command))
    words = [*inline_code(text), *(word for word in typed if "=" in word)]
    for word in words:
        name = word.split("=")[0]
        if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name) and name.split(".")[0] in SETTINGS:
            assert name in known | groups or (ROOT / name).exists(), word


def test_settings_reference_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


def test_every_shim_is_explained():
    text = (ROOT / "docs" / "platforms.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert listed == [shim.name for shim in SHIMS]


def test_every_package_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `megatron_asvr/(\w+)/`", text, re.MULTILINE))
    assert listed == {p.parent.name for p in (ROOT / "megatron_asvr").glob("*/__init__.py")}


def test_every_asvr_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (choices,) = (a.choices for a in build_parser()._actions if a.choices)
    assert set(choices) == set(re.findall(r"^\| `asvr ([\w-]+)", text, re.MULTILINE))
