"""Folders that appear complete or not at all.

A folder is built under a temporary name beside its target and renamed in one step. Nobody ever sees
half a model.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_asvr.errors import ConversionError
from megatron_asvr.hf.files import sync


def partial_folder(out: Path) -> Path:
    """An empty folder beside ``out``, which must not exist, to be passed to `finalize`.

    Raises:
        ConversionError: ``out`` exists.
    """
    _refuse_existing(out)
    partial = out.parent / f".{out.name}.partial-export"
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    partial.mkdir(parents=True)
    return partial


@contextlib.contextmanager
def removed_on_error(partial: Path) -> Iterator[None]:
    """Inside, any exception removes ``partial`` and goes on."""
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def finalize(partial: str | Path, out: str | Path) -> Path:
    """``out``, after ``partial`` was forced to disk and renamed to it in one step.

    Raises:
        ConversionError: ``out`` exists; nothing is ever overwritten.
    """
    out = Path(out)
    _refuse_existing(out)
    sync(Path(partial))
    Path(partial).rename(out)
    return out


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise ConversionError(f"{out} exists already; remove it or choose another folder")
