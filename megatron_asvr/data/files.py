"""Files that are either complete or absent, and names that follow from settings."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Hash of plain values, independent of the order of the keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write ``parts`` to ``path``; other processes see the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's 0600 would lock out the other users of a shared cache
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_table(folder: Path, table: pa.Table, name: str | None = None) -> Path:
    """Write a table as an Arrow file, named by its content unless ``name`` is given; the file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    content = memoryview(sink.getvalue())
    path = folder / f"{name or hashlib.sha256(content).hexdigest()[:32]}.arrow"
    write_atomically(path, content)
    return path


def read_table(path: Path) -> pa.Table | None:
    """A table mapped into memory, or None when the file is absent or damaged."""
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid):
        return None
