"""The files that a run or a command reads and makes, by the name of what gives them."""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_asvr.config.schema import PARTS, Config
from megatron_asvr.data import locations
from megatron_asvr.errors import DataError

# Arguments of commands without a configuration.
_READ = {
    "checkpoint": ("path", "other"),
    "convert": ("model", "source", "folder", "data", "images"),
    "eval": ("model", "data", "images", "baseline"),
    "tokenizer": ("vision", "folder", "data", "images"),
}
_WRITTEN = ("out",)


def read_by_run(config: Config, *, weights: bool = True) -> dict[str, str]:
    """What a run needs before it can start.

    Args:
        config: the run.
        weights: whether it also needs the model's weights, as all but data commands do.
    """
    found = {"model.text_tokenizer": config.model.text_tokenizer}
    if config.loss.visual_weight:
        found["model.visual_tokenizer"] = config.model.visual_tokenizer
    if weights:
        found["init.all"] = config.init.all
        found |= {f"init.{part}": getattr(config.init, part) for part in PARTS}
    for split in ("train", "eval"):
        for number, source in enumerate(getattr(config.data, split)):
            found[f"data.{split}[{number}].path"] = source.path
            found[f"data.{split}[{number}].images"] = source.images
    return {name: path for name, path in found.items() if path is not None}


def read_by_command(args: argparse.Namespace) -> dict[str, str]:
    """What a command without a configuration needs."""
    names = _READ.get(args.command, ())
    return {name: path for name in names if (path := getattr(args, name, None)) is not None}


def written_by_command(args: argparse.Namespace) -> list[str]:
    """What a command without a configuration makes."""
    return [path for name in _WRITTEN if (path := getattr(args, name, None)) is not None]


def missing(paths: Mapping[str, str]) -> dict[str, str]:
    """Those that are not there; what a URL names is not asked for."""
    return {name: path for name, path in paths.items() if not _exists(path)}


def maker(path: str, made: Mapping[str, str]) -> str | None:
    """Who makes a path.

    Args:
        path: what is wanted.
        made: who makes what, by path.
    """
    wanted = Path(path).absolute()
    for place, who in made.items():
        if wanted.is_relative_to(Path(place).absolute()):
            return who
    return None


def folders(paths: Iterable[str]) -> list[str]:
    """The outermost folders of this machine that hold some paths."""
    places = {_folder(path) for path in paths if not locations.is_url(path)}
    return sorted(str(p) for p in places if not any(p != q and p.is_relative_to(q) for q in places))


def _folder(path: str) -> Path:
    fixed = Path(path.partition("{")[0].partition("*")[0]).absolute()
    return fixed if Path(path).is_dir() else fixed.parent


def _exists(path: str) -> bool:
    if locations.is_url(path):
        return True
    try:
        return all(Path(file).exists() for file in locations.expand(path))
    except DataError:
        return False
