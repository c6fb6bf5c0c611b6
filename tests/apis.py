"""Names and calls of one package in the sources of another, read and never imported.

``Sources`` finds a dotted name in unpacked packages: through re-exports, base classes and stubs.
``problems`` holds a file against them: every name that it takes from there exists, and every call
binds to the signature. What is compiled, or made at run time, cannot be read; it is left alone.
"""

import ast
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Found:
    """What a name stands for: definitions (several under overloads), or something unreadable."""

    module: str = ""
    nodes: tuple[ast.AST, ...] = ()

    @property
    def is_readable(self) -> bool:
        return bool(self.nodes)


UNREADABLE = Found()


@dataclass
class Module:
    """One source file and the names at its top level."""

    name: str
    is_package: bool
    tree: ast.Module
    entries: dict[str, list[tuple]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for node in flat(self.tree.body):
            self._enter(node)

    def absolute(self, node: ast.ImportFrom) -> str:
        """Full name of the module that a relative or absolute import takes from."""
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        parts = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _enter(self, node: ast.AST) -> None:
        def put(name: str, *what: object) -> None:
            self.entries.setdefault(name, []).append(what)

        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            put(node.name, "node", node)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name == "*":
                    self.stars.append(self.absolute(node))
                else:
                    put(alias.asname or alias.name, "name", f"{self.absolute(node)}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                full = alias.name if alias.asname else alias.name.split(".")[0]
                put(alias.asname or full, "name", full)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name)):
                put(name, "value", node.value)


def flat(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when a module does: those under if, try and with too."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                yield from flat(getattr(node, part, ()))


class Sources:
    """Packages on disk.

    Args:
        roots: folders that packages lie in; the first one that has a module wins.
        packages: dotted names of what is looked into; all else is unreadable.
    """

    def __init__(self, roots: Iterable[Path], packages: Iterable[str]) -> None:
        self.roots, self.packages = tuple(roots), tuple(packages)
        self._modules: dict[str, Module | None] = {}
        self._members: dict[ast.ClassDef, dict[str, list[ast.FunctionDef]]] = {}

    def covers(self, dotted: str) -> bool:
        return any(dotted == p or dotted.startswith(p + ".") for p in self.packages)

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def folder(self, package: str) -> Path:
        """The folder of a package that is there."""
        return next(p for root in self.roots if (p := root / package.replace(".", "/")).is_dir())

    def _read(self, name: str) -> Module | None:
        for root in self.roots:
            place = root.joinpath(*name.split("."))
            for path in (
                *(place / f"__init__.{end}" for end in ("pyi", "py")),
                *(place.with_name(f"{place.name}.{end}") for end in ("pyi", "py")),
            ):
                if path.is_file():
                    tree = ast.parse(path.read_text(encoding="utf-8"))
                    return Module(name, path.stem == "__init__", tree)
            if place.is_dir():
                return Module(name, True, ast.Module([], []))
        return None

    def is_compiled(self, name: str) -> bool:
        """Whether a module is there as a library only."""
        places = [root.joinpath(*name.split(".")) for root in self.roots]
        return any(True for place in places for _ in place.parent.glob(f"{place.name}.*so"))

    def find(self, dotted: str, seen: frozenset[str] = frozenset()) -> Found | None:
        """What ``dotted`` stands for; None: there is no such thing."""
        if not self.covers(dotted) and not any(p.startswith(dotted + ".") for p in self.packages):
            return UNREADABLE
        if dotted in seen:
            return None
        if (module := self.module(dotted)) is not None:
            return Found(dotted, (module.tree,))
        if self.is_compiled(dotted):
            return UNREADABLE
        parent, _, name = dotted.rpartition(".")
        owner = self.find(parent, seen | {dotted}) if parent else None
        if owner is None or not owner.is_readable:
            return owner
        node = owner.nodes[0]
        if isinstance(node, ast.Module):
            return self._in_module(owner.module, name, seen | {dotted})
        if isinstance(node, ast.ClassDef):
            return self.member(owner, name)
        return UNREADABLE  # an attribute of a function, set somewhere

    def _in_module(self, module: str, name: str, seen: frozenset[str]) -> Found | None:
        source = self.module(module)
        nodes, unreadable = [], False
        for kind, what in source.entries.get(name, ()):
            found: Found | None = UNREADABLE
            if kind == "node":
                found = Found(module, (what,))
            elif kind == "name":
                found = self.find(what, seen)
            elif dotted := dotted_name(what):  # another name for something of this module
                found = self.find(f"{module}.{dotted}", seen) or UNREADABLE
            if found is not None and found.is_readable:
                module, nodes = found.module, [*nodes, *found.nodes]
            unreadable |= found is UNREADABLE
        if nodes and not unreadable:
            return Found(module, tuple(nodes))
        if unreadable or "__getattr__" in source.entries or name in ("__name__", "__file__"):
            return UNREADABLE
        for star in source.stars:
            found = self.find(f"{star}.{name}", seen)
            if found is not None:
                return found
        if self.module(f"{module}.{name}"):
            return self.find(f"{module}.{name}", seen)
        return UNREADABLE if self.is_compiled(module) else None

    def bases(self, found: Found) -> Iterator[Found]:
        """Base classes of a class, as far as they can be read; else ``UNREADABLE``."""
        for base in found.nodes[0].bases:
            name = dotted_name(base)
            if name is None or name in ("object", "Generic", "ABC"):
                if name is None and not ast.unparse(base).startswith(("Generic", "Protocol")):
                    yield UNREADABLE
                continue
            yield self.find(f"{found.module}.{name}") or UNREADABLE
        if found.nodes[0].keywords:  # a metaclass
            yield UNREADABLE

    def member(self, owner: Found, name: str) -> Found | None:
        """A method, a field or an attribute of instances of a class, or of its bases."""
        if name in (methods := self._methods(owner.nodes[0])):
            return Found(owner.module, tuple(methods[name])) if methods[name] else UNREADABLE
        bases = [self.member(b, name) if b.is_readable else UNREADABLE for b in self.bases(owner)]
        readable = [base for base in bases if base is not None]
        return readable[0] if readable else None

    def _methods(self, node: ast.ClassDef) -> dict[str, list[ast.FunctionDef]]:
        """Methods by name; an attribute of the class or of its instances has none."""
        if node not in self._members:
            found = self._members[node] = {}
            for part in ast.walk(node):
                if isinstance(part, FUNCTIONS):
                    found.setdefault(part.name, []).append(part)
                elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                    found[part.id] = []
                elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                    found[part.attr] = []
        return self._members[node]

    def signatures(self, found: Found) -> list[inspect.Signature] | None:
        """How something may be called; None where that cannot be read."""
        node = found.nodes[0]
        if isinstance(node, FUNCTIONS):
            return [signature_of(x) for x in found.nodes if isinstance(x, FUNCTIONS)]
        if not isinstance(node, ast.ClassDef):
            return None
        made = self.member(found, "__init__")
        if made is not None and made.is_readable:
            return [without_first(signature_of(x)) for x in made.nodes]
        fields = self._fields(found)
        return None if fields is None else [inspect.Signature(fields)]

    def _fields(self, found: Found) -> list[inspect.Parameter] | None:
        """Parameters of a dataclass; None: it is none."""
        node, fields = found.nodes[0], {}
        if not any("dataclass" in ast.unparse(x) for x in node.decorator_list):
            return None
        for base in self.bases(found):
            if not base.is_readable:
                return None
            fields |= {x.name: x for x in self._fields(base) or ()}
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation):
                fields[line.target.id] = inspect.Parameter(
                    line.target.id, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None
                )
        return list(fields.values())


def dotted_name(node: ast.AST | None) -> str | None:
    """``a.b.c`` of a chain of attributes; None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted_name(node.value)):
        return f"{owner}.{node.attr}"
    return None


def alternatives(annotation: ast.expr) -> list[ast.expr]:
    """The types of ``A | B``."""
    if isinstance(annotation, ast.BinOp):
        return [*alternatives(annotation.left), *alternatives(annotation.right)]
    return [annotation]


def signature_of(node: ast.FunctionDef) -> inspect.Signature:
    """The signature of a function definition, of a class method as it is called."""
    spec, kinds = node.args, inspect.Parameter
    plain = [*spec.posonlyargs, *spec.args]
    first_default = len(plain) - len(spec.defaults)
    parameters = [
        kinds(
            arg.arg,
            kinds.POSITIONAL_ONLY if i < len(spec.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD,
            default=None if i >= first_default else kinds.empty,
        )
        for i, arg in enumerate(plain)
    ]
    if spec.vararg:
        parameters.append(kinds(spec.vararg.arg, kinds.VAR_POSITIONAL))
    parameters += [
        kinds(arg.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None)
        for arg, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
    ]
    if spec.kwarg:
        parameters.append(kinds(spec.kwarg.arg, kinds.VAR_KEYWORD))
    decorators = [ast.unparse(x) for x in node.decorator_list]
    return inspect.Signature(parameters["classmethod" in decorators :])


def without_first(signature: inspect.Signature) -> inspect.Signature:
    """The signature of a bound method."""
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def binds(call: ast.Call, signature: inspect.Signature) -> str | None:
    """Why a call does not fit a signature; None where it does, as far as it is written out."""
    keywords = {x.arg: None for x in call.keywords if x.arg is not None}
    is_open = any(x.arg is None for x in call.keywords)
    positional = [x for x in call.args if not isinstance(x, ast.Starred)]
    is_open |= len(positional) < len(call.args)
    try:
        (signature.bind_partial if is_open else signature.bind)(*positional, **keywords)
    except TypeError as error:
        return str(error)
    return None


class Reader:
    """One file of ours and what its names stand for in ``sources``."""

    def __init__(self, text: str, sources: Sources, name: str = "") -> None:
        self.sources = sources
        self.tree = ast.parse(text)
        self.own = Module(name, False, ast.Module([], []))

    @cached_property
    def names(self) -> dict[str, str]:
        """Full name of what is imported, by the name it has here; in functions too."""
        table = {}
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self.own._enter(node)
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                called, args = ast.unparse(node.value.func), node.value.args
                if called.endswith("import_module") and isinstance(args[0], ast.Constant):
                    table[ast.unparse(node.targets[0])] = args[0].value
        for name, entries in self.own.entries.items():
            table.setdefault(name, entries[-1][1])
        return table

    def full(self, node: ast.AST) -> str | None:
        """Full name of an expression that is taken from ``sources``; else None."""
        head, _, rest = (dotted_name(node) or "").partition(".")
        if head not in self.names:
            return None
        dotted = self.names[head] + (f".{rest}" if rest else "")
        return dotted if self.sources.covers(dotted) else None

    def problems(self) -> Iterator[tuple[int, str]]:
        """Line, and what is wrong there."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and self.sources.covers(node.module or ""):
                for name in (f"{node.module}.{x.name}" for x in node.names if x.name != "*"):
                    if self.sources.find(name) is None:
                        yield node.lineno, f"there is no {name}"
            elif isinstance(node, ast.Attribute) and (dotted := self.full(node)):
                if self.sources.find(dotted) is None:
                    yield node.lineno, f"there is no {dotted}"
            elif isinstance(node, ast.Call) and (dotted := self.full(node.func)):
                yield from self._call(node, dotted, self.sources.find(dotted))
            elif isinstance(node, ast.ClassDef):
                yield from self._supers(node)
            elif isinstance(node, FUNCTIONS):
                yield from self._annotated(node)

    def _call(
        self, node: ast.Call, what: str, found: Found | None, *, is_bound: bool = False
    ) -> Iterator[tuple[int, str]]:
        if found is None or not found.is_readable:
            return
        ways = self.sources.signatures(found)
        if ways is not None:
            whys = [binds(node, without_first(way) if is_bound else way) for way in ways]
            if all(whys):
                yield node.lineno, f"{what}: {whys[0]}"

    def _supers(self, node: ast.ClassDef) -> Iterator[tuple[int, str]]:
        """Calls of ``super()`` in a class of ours with one base class from there."""
        names = [name for base in node.bases if (name := self.full(base))]
        if len(names) != 1 or (base := self.sources.find(names[0])) is None or not base.is_readable:
            return
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("super()."):
                name = call.func.attr
                if name == "__init__":  # perhaps that of a dataclass
                    yield from self._call(call, names[0], base)
                    continue
                found = self.sources.member(base, name)
                if found is None:
                    yield call.lineno, f"there is no {names[0]}.{name}"
                yield from self._call(call, f"{names[0]}.{name}", found, is_bound=True)

    def _annotated(self, node: ast.FunctionDef) -> Iterator[tuple[int, str]]:
        """Attributes of arguments whose type is a class from there."""
        for arg in (*node.args.args, *node.args.kwonlyargs):
            annotation = arg.annotation
            if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
                annotation = ast.parse(annotation.value, mode="eval").body
            sides = alternatives(annotation) if annotation else []
            names = [self.full(side) for side in sides]
            types = [self.sources.find(name) for name in names if name]
            if not types or len(types) < len(sides):
                continue
            if not all(t and t.nodes and isinstance(t.nodes[0], ast.ClassDef) for t in types):
                continue
            for use in ast.walk(node):
                if (
                    isinstance(use, ast.Attribute)
                    and ast.unparse(use.value) == arg.arg
                    and all(self.sources.member(x, use.attr) is None for x in types)
                ):
                    yield use.lineno, f"there is no {names[0]}.{use.attr}"
