"""What megatron-core imports only where it can, and goes on without where it cannot.

Read from its sources, under given versions: of ``if is_te_min_version("2.3.0")`` only one side.
"""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.version import Version

from tests.apis import Sources

FORGIVING = {"ImportError", "ModuleNotFoundError", "Exception", "AttributeError"}


class Import(NamedTuple):
    """One name that a file imports inside ``try``."""

    file: str
    name: str  # with its module
    is_there: bool | None  # None: its package is none of those that can be read


def forgives(node: ast.Try) -> bool:
    """Whether the code goes on when an import in the body fails."""
    names = {
        ast.unparse(x)
        for handler in node.handlers
        for x in (handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type])
        if x is not None
    }
    return bool(names & FORGIVING) or any(handler.type is None for handler in node.handlers)


def holds(test: ast.expr, te: Version) -> bool | None:
    """Value of a condition about Transformer Engine's version; None: about something else."""
    if isinstance(test, ast.Name) and test.id == "HAVE_TE":
        return True
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = holds(test.operand, te)
        return None if value is None else not value
    if isinstance(test, ast.BoolOp):
        values = [holds(x, te) for x in test.values]
        decisive = isinstance(test.op, ast.Or)
        if decisive in values:
            return decisive
        return None if None in values else not decisive
    if isinstance(test, ast.Call) and ast.unparse(test.func).endswith("is_te_min_version"):
        return te >= Version(test.args[0].value)
    return None


class _Reader:
    def __init__(self, file: str, sources: Sources, te: Version) -> None:
        self.file, self.sources, self.te = file, sources, te

    def walk(self, body: Iterable[ast.AST], *, inside: bool) -> Iterator[Import]:
        """Imports of ``body``; ``inside``: of a ``try`` that forgives."""
        for node in body:
            if inside and isinstance(node, (ast.Import, ast.ImportFrom)):
                yield from self.imports(node)
            elif isinstance(node, ast.If):
                value = holds(node.test, self.te)
                yield from self.walk(node.body if value is not False else (), inside=inside)
                yield from self.walk(node.orelse if value is not True else (), inside=inside)
            elif isinstance(node, ast.Try):
                tried = list(self.walk(node.body, inside=inside or forgives(node)))
                yield from tried
                if any(not found.is_there for found in tried):  # else nothing is caught
                    yield from self.walk(node.handlers, inside=False)
                yield from self.walk((*node.orelse, *node.finalbody), inside=inside)
            else:
                yield from self.walk(ast.iter_child_nodes(node), inside=inside)

    def imports(self, node: ast.Import | ast.ImportFrom) -> Iterator[Import]:
        prefix = ""
        if isinstance(node, ast.ImportFrom):
            if node.level:
                return  # its own files
            prefix = f"{node.module}."
        for alias in node.names:
            name = prefix + alias.name
            covered = self.sources.covers(name.partition(".")[0])
            yield Import(self.file, name, self.sources.find(name) is not None if covered else None)


def optional_imports(folder: Path, sources: Sources, te: str) -> Iterator[Import]:
    """Every name that a package imports inside ``try`` and can go on without.

    Args:
        folder: of the package.
        sources: what the names are looked up in.
        te: version of Transformer Engine.
    """
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        file = path.relative_to(folder).as_posix()
        yield from _Reader(file, sources, Version(te)).walk(tree.body, inside=False)
