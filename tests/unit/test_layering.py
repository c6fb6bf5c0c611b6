"""Each package imports only lower layers, and each foreign library only where it belongs."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2] / "megatron_asvr"

# Lowest first; packages of one row are siblings and do not import one another.
LAYERS = (
    {"errors"},
    {"shapes", "batch", "log"},
    {"config"},
    {"platforms"},
    {"parallel"},
    {"precision"},
    {"model", "data"},
    {"checkpoint"},
    {"hf"},
    {"planner"},
    {"train"},
    {"launch"},
    {"cli"},
)
HEIGHT = {name: i for i, row in enumerate(LAYERS) for name in row}

# A library, and the places that may use it (a folder ends in a slash).
HOMES = {
    "torch.cuda": ("platforms/",),
    "megatron.core.parallel_state": ("parallel/", "platforms/"),
    "megatron.core.mpu": ("parallel/", "platforms/"),
    "megatron.core.models.gpt.GPTModel": ("model/language.py",),
    "megatron.core.models.gpt.gpt_model": ("model/language.py",),
    "transformer_engine": ("precision/", "platforms/"),
    "transformers": ("hf/",),
    "nvidia": ("data/dali/",),
    "lmms_eval": ("hf/suite/lmms.py",),
    "datasets": ("hf/suite/lmms.py",),
    "loguru": ("hf/suite/lmms.py",),
    "wandb": ("train/metrics.py",),
    "mpi4py": ("launch/",),
}


class Use(NamedTuple):
    """One dotted name that a file imports or reaches through an attribute."""

    file: str
    line: int
    name: str
    at_top: bool  # an unindented import: it runs when the module is imported


def uses(path: Path) -> Iterator[Use]:
    """Every dotted name that a file imports, and every use of ``torch.cuda``."""
    file = path.relative_to(ROOT).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for name in names_of(node):
            yield Use(file, node.lineno, name, node in tree.body)


def names_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda":
        return ["torch.cuda"]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        return [a.value for a in node.args if isinstance(a, ast.Constant)]
    return []


ALL_USES = [use for path in sorted(ROOT.rglob("*.py")) for use in uses(path)]


def inside(name: str, root: str) -> bool:
    return name == root or name.startswith(root + ".")


def test_every_package_has_a_layer():
    code = [path for path in ROOT.iterdir() if path.name[0] != "_" and not path.is_symlink()]
    found = {path.name.removesuffix(".py") for path in code}
    assert found == set(HEIGHT)


def test_imports_point_downwards():
    wrong = []
    for use in ALL_USES:
        owner = use.file.split("/")[0].removesuffix(".py")
        parts = use.name.split(".")
        if parts[0] != "megatron_asvr" or owner in ("__init__", "__main__") or len(parts) == 1:
            continue
        target = parts[1]
        if target in HEIGHT and target != owner and HEIGHT[target] >= HEIGHT[owner]:
            wrong.append(f"{use.file}:{use.line}: {owner} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_libraries_stay_in_their_place():
    wrong = [
        f"{use.file}:{use.line}: {use.name} belongs to {' or '.join(homes)}"
        for use in ALL_USES
        for library, homes in HOMES.items()
        if inside(use.name, library) and not use.file.startswith(homes)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_process_is_prepared_before_megatron_is_imported():
    wrong = []
    for file in sorted({use.file for use in ALL_USES if not use.file.startswith("platforms/")}):
        lines = [use for use in ALL_USES if use.file == file and use.at_top]
        megatron = [use.line for use in lines if inside(use.name, "megatron")]
        prepared = [use.line for use in lines if inside(use.name, "megatron_asvr.platforms.mcore")]
        if megatron and min(prepared, default=10**6) > min(megatron):
            wrong.append(f"{file}:{min(megatron)}: import megatron_asvr.platforms.mcore first")
    assert not wrong, "\n".join(wrong)
