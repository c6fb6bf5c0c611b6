"""Write docs/configuration.md: every setting with its type, default and meaning.

The schema is the source: defaults and types come from the dataclasses, meanings from the comment
beside each field. ``tests/unit/test_docs.py`` fails when the page is out of date.
"""

import ast
import dataclasses
import inspect
import io
import tokenize
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from megatron_asvr.config import load, schema

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"

NAMES = {str: "text", int: "integer", float: "number", bool: "true or false"}

HEADER = """# Configuration

*Written by `make docs` from the comments of `megatron_asvr/config/schema.py`; change them there.*

A run is described by one YAML file. Values are taken from, last one wins:

1. the defaults below,
2. the preset that the file names with `preset: NAME` (shipped, or a path relative to the file),
3. the file itself,
4. `a.b=c` arguments of the command; the value is read as YAML.

Shipped presets: {presets}. An unknown key, a value of the wrong type and a
combination that cannot work are each refused before anything starts, with the values that would.
`asvr train FILE --dry-run` prints the resolved settings and the plan.
"""


@cache
def meanings() -> dict[tuple[str, str], str]:
    """Comment of each field by class and field name; fields without a comment are left out."""
    source = Path(schema.__file__).read_text(encoding="utf-8")
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for cls in ast.parse(source).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        for node in cls.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                text = " ".join(by_line[line] for line in lines if line in by_line)
                if text:
                    found[cls.name, node.target.id] = text
    return found


def type_text(kind: Any) -> str:
    """How a type is called in the table."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return ", ".join("unset" if a is type(None) else type_text(a) for a in args)
    if origin is typing.Literal:
        return " or ".join(f"`{a}`" for a in args)
    if origin is tuple:
        return f"list of {type_text(args[0])}"
    if dataclasses.is_dataclass(kind):
        fields = [
            (f.name, meanings().get((kind.__name__, f.name))) for f in dataclasses.fields(kind)
        ]
        keys = (f"`{name}` ({text})" if text else f"`{name}`" for name, text in fields)
        return f"mappings with {', '.join(keys)}"
    return NAMES[kind]


def default_text(field: dataclasses.Field[Any]) -> str:
    """The default as it would be written in YAML."""
    if field.default is dataclasses.MISSING:
        return "required"
    if field.default is None:
        return "unset"
    plain = list(field.default) if isinstance(field.default, tuple) else field.default
    text = yaml.safe_dump(plain, default_flow_style=True).removesuffix("...\n").strip()
    return f"`{text}`"


def sections(cls: type, prefix: str) -> Iterator[str]:
    """One Markdown section for each group of settings, in the schema's order."""
    hints = typing.get_type_hints(cls)
    rows, nested = [], []
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        name = f"{prefix}.{field.name}" if prefix else field.name
        if dataclasses.is_dataclass(kind):
            nested.append((kind, name))
            continue
        meaning = meanings().get((cls.__name__, field.name), "").replace("<", "&lt;")
        rows.append(f"| `{name}` | {type_text(kind)} | {default_text(field)} | {meaning} |")
    if rows:
        lines = (f"## {prefix}", "", inspect.cleandoc(cls.__doc__ or ""), "")
        table = ("| setting | type | default | meaning |", "|---|---|---|---|", *rows)
        yield "\n".join((*lines, *table)) + "\n"
    for kind, name in nested:
        yield from sections(kind, name)


def page() -> str:
    """The whole page."""
    names = sorted(path.stem for path in load.PRESETS.glob("*.yaml"))
    header = HEADER.format(presets=", ".join(f"`{name}`" for name in names))
    return "\n".join((header, *sections(schema.Config, "")))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
