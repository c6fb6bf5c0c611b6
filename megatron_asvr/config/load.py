"""Fill the schema: preset < YAML file < ``a.b=c`` on the command line.

A YAML file may name its preset (``preset: NAME``): one shipped in ``config/presets`` or a path
relative to the file. Every mistake is a ConfigError that names the key, the value, what is
allowed and the nearest valid name.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_asvr.config.schema import Config
from megatron_asvr.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"


def load(path: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a YAML file with overrides applied.

    Args:
        path: YAML file, or the name of a shipped preset; None gives the schema's defaults.
        overrides: ``a.b=c`` strings; the value is YAML, so ``data.train=[]`` works too.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type or is not allowed.
    """
    tree = _read_tree(_find(str(path), Path())) if path is not None else {}
    for text in overrides:
        tree = _merge(tree, _parse_override(text))
    return from_dict(tree)


def from_dict(tree: Mapping[str, Any]) -> Config:
    """The configuration described by nested plain values."""
    return _build(Config, tree, "")


def override(config: Config, overrides: Iterable[str]) -> Config:
    """The configuration with ``a.b=c`` settings applied.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type or is not allowed.
    """
    tree = to_dict(config)
    for text in overrides:
        tree = _merge(tree, _parse_override(text))
    return from_dict(tree)


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values of a configuration; ``from_dict`` gives it back."""
    return dataclasses.asdict(config, dict_factory=_plain)


def save(config: Config, path: Path) -> None:
    """Write the whole resolved configuration as YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def flatten(config: Config) -> dict[str, Any]:
    """Every leaf setting by its dotted name."""
    leaves: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if dataclasses.is_dataclass(value):
            for f in dataclasses.fields(value):
                walk(f"{prefix}.{f.name}" if prefix else f.name, getattr(value, f.name))
        else:
            leaves[prefix] = value

    walk("", config)
    return leaves


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in items}


def _find(name: str, folder: Path) -> Path:
    shipped = PRESETS / f"{name}.yaml"
    for candidate in (folder / name, shipped):
        if candidate.is_file():
            return candidate
    names = sorted(p.stem for p in PRESETS.glob("*.yaml"))
    raise ConfigError(
        f"configuration {name!r} is neither a file nor a preset{_nearest(name, names)}; "
        f"presets: {', '.join(names)}"
    )


def _read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: its preset leads back to itself; remove one `preset:` line")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as err:
        raise ConfigError(f"{path} is not valid YAML: {err}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; wanted a mapping of settings")
    preset = tree.pop("preset", None)
    if preset is None:
        return tree
    base = _read_tree(_find(str(preset), path.parent), (*seen, path.resolve()))
    return _merge(base, tree)


def _parse_override(text: str) -> dict[str, Any]:
    key, eq, value = text.partition("=")
    if not eq or not key:
        raise ConfigError(f"override {text!r} is not of the form a.b=c")
    try:
        tree: Any = yaml.safe_load(value)
    except yaml.YAMLError as err:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {err}") from None
    for name in reversed(key.split(".")):
        tree = {name: tree}
    return tree


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merge(old, value)
        merged[key] = value
    return merged


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (nearest: {close[0]!r})" if close else ""


def _build(cls: type, tree: Any, where: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where or 'configuration'}={tree!r} must be a mapping of settings")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            full = f"{where}.{key}" if where else str(key)
            raise ConfigError(
                f"unknown setting {full!r}{_nearest(str(key), hints)}; "
                f"allowed here: {', '.join(hints)}"
            )
    values = {
        key: _convert(hints[key], value, f"{where}.{key}" if where else key)
        for key, value in tree.items()
    }
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}.{missing[0]} is required and not given")
    return cls(**values)


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is typing.Literal:
        return _choice(args, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}={value!r} must be a list")
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    return _scalar(kind, value, where)


def _choice(allowed: tuple[Any, ...], value: Any, where: str) -> Any:
    for option in allowed:
        if value == option and type(value) is type(option):
            return option
    names = [str(a) for a in allowed]
    raise ConfigError(
        f"{where}={value!r} is not allowed{_nearest(str(value), names)}; use {', '.join(names)}"
    )


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-3 (no dot) as a string
        except (TypeError, ValueError):
            pass
        else:
            if math.isfinite(number):
                return number
            raise ConfigError(f"{where}={value!r} must be a finite number")
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}={value!r} is a {type(value).__name__}; wanted {kind.__name__}")
