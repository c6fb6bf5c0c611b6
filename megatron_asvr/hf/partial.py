"""Folders that appear complete or not at all.

A folder is built under a temporary name beside its target and renamed in one step. Nobody ever sees
half a model.
"""

import contextlib
import glob
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from megatron_asvr.errors import ConversionError
from megatron_asvr.hf.files import sync


def partial_folder(out: Path) -> Path:
    """An empty folder beside ``out``, which must not exist, to be passed to `finalize`.

    It is this process's own; folders that killed processes of this machine left are removed.

    Raises:
        ConversionError: ``out`` exists.
    """
    _refuse_existing(out)
    stem = f".{out.name}.partial-{socket.gethostname()}-"
    for left in out.parent.glob(f"{glob.escape(stem)}*"):
        if not Path("/proc", left.name.removeprefix(stem)).exists():
            shutil.rmtree(left, ignore_errors=True)
    partial = out.parent / f"{stem}{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
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
