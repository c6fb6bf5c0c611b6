"""Platform branches stand in the places of the ledger, and every row has its test and probe."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_asvr.platforms import ledger
from megatron_asvr.platforms.base import Platform
from megatron_asvr.platforms.shims import SAVINGS, SHIMS

import pytest

from tools.ledger import PAGE, page

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_asvr"
KINDS = {"cpu", "cuda", "nccl", "gloo", "te", "local"}  # compared with, they make a branch
FOREIGN = {"transformer_engine", "transformer_engine_torch", "apex", "amp_C", "triton"}
ASKS = {
    *("is_cuda", "is_cpu", "get_device", "get_device_type", "is_nccl_available"),
    *("supports_fork", "compute_capability", "num_gpus"),
}
CLASSES = {"CpuPlatform", "CudaPlatform"}
MODULES = {"cuda", "accelerator", "torch.cuda", "torch.accelerator"}


def branches(source: str) -> set[str]:
    """Where a file decides by the kind of device: names of functions, classes and the module."""
    return {where for where, node in _nodes(ast.parse(source), "<module>") if _decides(node)}


def _nodes(node: ast.AST, where: str) -> Iterator[tuple[str, ast.AST]]:
    for child in ast.iter_child_nodes(node):
        inner = where
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner = child.name
        yield (("<imports>" if _imports(child) else where), child)
        yield from _nodes(child, inner)


def _imports(node: ast.AST) -> bool:
    names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return any(name.partition(".")[0] in FOREIGN for name in names)


def _decides(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        held = [x for side in sides for x in ast.walk(side) if isinstance(x, ast.Constant)]
        return any(isinstance(x.value, str) and x.value in KINDS for x in held)
    if isinstance(node, ast.Dict):
        return any(isinstance(k, ast.Constant) and k.value in KINDS for k in node.keys)
    if isinstance(node, ast.Name):
        return node.id in CLASSES
    if isinstance(node, ast.alias):
        return node.name in CLASSES | MODULES
    if isinstance(node, ast.MatchValue):
        return isinstance(node.value, ast.Constant) and node.value.value in KINDS
    if isinstance(node, ast.Attribute):
        text = ast.unparse(node)
        asked = text in ("torch.cuda", "torch.version.cuda", "torch.accelerator")
        return asked or node.attr in ASKS | CLASSES or text.endswith("device.type")
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func).rpartition(".")[2]
        text = ast.unparse(node.args[0]) if node.args else ""
        if name in ("import_module", "find_spec", "__import__"):
            return "backend" in text or any(word in text for word in FOREIGN)
        return name in ("getattr", "hasattr") and "cuda" in ast.unparse(node)
    return _imports(node)


def found() -> set[str]:
    """Every branch outside ``platforms``, as the ledger writes places."""
    files = [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent != PACKAGE / "platforms"]
    named = [(path, path.relative_to(PACKAGE).as_posix()) for path in files]
    return {
        name if name in places() else f"{name}::{where}"
        for path, name in named
        for where in branches(path.read_text(encoding="utf-8"))
    }


def places() -> list[str]:
    return [place for row in ledger.ROWS for place in row.places]


def test_platform_branches_stand_in_the_ledger() -> None:
    assert sorted(found()) == sorted(places()), "change platforms/ledger.py, or do without"


@pytest.mark.parametrize(
    "line",
    [
        "if select()[0].name == 'cuda': pass",
        "if 'cpu' != platform.name: pass",
        "if x.is_cuda: pass",
        "torch.cuda.synchronize()",
        "from torch import cuda as c; c.synchronize()",
        "import torch.cuda as c; c.synchronize()",
        "if x.get_device() >= 0: pass",
        "if x.device.type == kind: pass",
        "if device == torch.device('cuda'): pass",
        "if str(device).startswith('x') or device in ('cuda', 'xpu'): pass",
        "importlib.util.find_spec('transformer_engine')",
        "import transformer_engine.pytorch as te",
        "from apex import optimizers",
        "if hasattr(torch, 'cuda'): pass",
        "if dist.get_backend() == 'nccl': pass",
        "{'nccl': 1}[dist.get_backend()]",
        "match kind:\n        case 'cuda': pass",
        "if platform.supports_fork: pass",
        "mib = 64 if platform.num_gpus else 8",
        "if isinstance(platform, cuda.CudaPlatform): pass",
        "from megatron_asvr.platforms.cpu import CpuPlatform",
    ],
)
def test_a_planted_branch_is_found(line: str) -> None:
    assert branches(f"def planted():\n    {line}\n") <= {"planted", "<imports>"}
    assert branches(f"def planted():\n    {line}\n")


def test_every_shim_and_question_to_a_platform_has_one_row() -> None:
    asked = {name for name in vars(Platform) if not name.startswith("_")}
    asked |= set(Platform.__annotations__)
    savings = {install.__name__ for install in SAVINGS}
    named = [name for row in ledger.ROWS for name in row.platform]
    assert sorted(named) == sorted(asked | {shim.name for shim in SHIMS} | savings)


def test_every_contract_is_a_test() -> None:
    for row in ledger.ROWS:
        file, *names = row.contract.split("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not re.search(r"pytest\.mark\.(gpu|te|slurm|eval|apis)\b", text), row.contract
        body = ast.parse(text).body
        for name in names:
            (node,) = (x for x in body if getattr(x, "name", None) == name)
            body = node.body
        assert names[-1].startswith("test_"), row.contract


def test_names_are_unique_and_every_row_says_everything() -> None:
    probes = [name for row in ledger.ROWS for name in row.probes]
    for names in ([row.name for row in ledger.ROWS], probes):
        assert len(names) == len(set(names))
    for row in ledger.ROWS:
        assert row.probes, row.name
        assert all((row.cuda, row.cpu, row.why, row.contract, row.ran)), row.name


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text), "run `make docs`"
