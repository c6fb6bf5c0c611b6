"""Where bytes are: one string names an image, whatever holds it.

    photos/a.jpg                            a file
    s3://bucket/photos/a.jpg                any URL that fsspec knows
    shards/00.tar#bytes=1536+20480          a part of a file: offset and size (nothing is unpacked)
    part-0.parquet#cell=17,image            a row and a column of a Parquet file
    part-0.parquet#cell=17,images,1         an item of the list in such a cell

``read`` gives the bytes of any of them, in any order.
"""

import os
import re
from functools import lru_cache
from glob import glob
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_asvr.errors import DataError

State = tuple[int, int]  # size in bytes, and what changes when the file is written again

_PART = re.compile(r"(?P<file>.*)#bytes=(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)
_CELL = re.compile(
    r"(?P<file>.*)#cell=(?P<row>\d+),(?P<column>[^,#]+)(?:,(?P<item>\d+))?", re.DOTALL
)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
KEPT_ROW_GROUPS = 2  # decoded row groups of Parquet files, which can only be read whole


def part(file: str, offset: int, size: int) -> str:
    """The location of ``size`` bytes of a file."""
    return f"{file}#bytes={offset}+{size}"


def cell(file: str, row: int, column: str, item: int | None = None) -> str:
    """The location of a cell of a Parquet file, or of an item of its list."""
    return f"{file}#cell={row},{column}" + (f",{item}" if item is not None else "")


def container(location: str) -> str:
    """The file that holds a location's bytes: the location itself unless it names a part."""
    match = _PART.fullmatch(location) or _CELL.fullmatch(location)
    return match["file"] if match else location


def join(folder: str | Path, name: str) -> str:
    """``name`` below ``folder``, unless it says itself where it is."""
    if is_url(name):
        return name
    return f"{str(folder).rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def absolute(location: str) -> str:
    """The same location whatever the working directory."""
    return location if is_url(location) else os.path.abspath(location)


def is_url(name: str | Path) -> bool:
    """Whether a name is left to fsspec; every other is a path of this machine."""
    return "://" in str(name)


def expand(pattern: str) -> list[str]:
    """The files that ``shard-{000..127}.tar`` or ``part-*.parquet`` stand for, in order.

    Raises:
        DataError: there is none.
    """
    names = [pattern]
    while (match := _RANGE.search(names[0])) is not None:
        first, last = match.groups()
        numbers = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
        names = [_RANGE.sub(number, name, count=1) for name in names for number in numbers]
        if not names:
            raise DataError(f"{pattern}: {match[0]} counts down; write the smaller number first")
    found = [file for name in names for file in (_glob(name) if glob_like(name) else [name])]
    if not found:
        raise DataError(f"{pattern}: no file matches")
    return found


def glob_like(name: str) -> bool:
    """Whether a name stands for all files that match it (URLs may hold ``?``)."""
    return "*" in name


def _glob(pattern: str) -> list[str]:
    if not is_url(pattern):
        return sorted(glob(pattern, recursive=True))
    files, path = _remote(pattern)
    return sorted(files.unstrip_protocol(name) for name in files.glob(path))


def below(folder: str) -> list[str]:
    """All files below a folder, in order.

    Raises:
        DataError: it is no folder.
    """
    if is_url(folder):
        files, path = _remote(folder)
        found = [files.unstrip_protocol(name) for name in files.find(path)]
    else:
        found = [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names]
    if not found:
        raise DataError(f"{folder} is no folder with files in it")
    return sorted(found)


def state(file: str) -> State:
    """Size of a file, and a number that changes when it is written again.

    Raises:
        OSError: it is not there.
    """
    if not is_url(file):
        status = os.stat(file)
        return status.st_size, status.st_mtime_ns
    files, path = _remote(file)
    token = sha256(str(files.ukey(path)).encode()).hexdigest()  # the store's times and check sums
    return int(files.info(path)["size"]), int(token[:15], 16)


def open_file(file: str) -> IO[bytes]:
    """A file or URL, opened for reading; it can be sought in.

    Raises:
        OSError: it is not there.
        DataError: the package for this kind of URL is not installed.
    """
    if not is_url(file):
        return open(file, "rb")
    files, path = _remote(file)
    return files.open(path, "rb")


def read(location: str) -> bytes:
    """The bytes at a location.

    Raises:
        OSError: they cannot be read, or the file ends before them.
        DataError: the package for this kind of URL is not installed, or a cell holds no bytes.
    """
    match = _PART.fullmatch(location)
    if match:
        offset, size = int(match["offset"]), int(match["size"])
        found = _read_part(match["file"], offset, size)
        if len(found) != size:
            raise OSError(None, f"the file ends {size - len(found)} bytes too early")
        return found
    match = _CELL.fullmatch(location)
    if match:
        return _read_cell(match["file"], int(match["row"]), match["column"], match["item"])
    if not is_url(location):
        return Path(location).read_bytes()
    files, path = _remote(location)
    return files.cat_file(path)


def open_parquet(file: str) -> pq.ParquetFile:
    """A Parquet file; only its footer is read.

    Raises:
        DataError: it cannot be read or is no Parquet file.
    """
    try:
        return pq.ParquetFile(open_file(file), pre_buffer=True)
    except OSError as error:
        raise DataError(f"data file {file} cannot be read: {error.strerror or error}") from error
    except pa.ArrowInvalid as error:
        raise DataError(f"data file {file} is not a Parquet file: {error}") from error


def _remote(url: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise DataError(
            f"{url} needs a package ({error}); pip install 'megatron_asvr[remote]'"
        ) from error
    except ValueError as error:
        raise DataError(f"{url}: {error}") from error


def _read_part(file: str, offset: int, size: int) -> bytes:
    if is_url(file):
        files, path = _remote(file)
        return files.cat_file(path, start=offset, end=offset + size)
    with open(file, "rb") as stream:
        stream.seek(offset)
        return stream.read(size)


def _read_cell(file: str, row: int, column: str, item: str | None) -> bytes:
    # A local file that was written again is opened again.
    stamp = None if is_url(file) else state(file)
    _, starts = _parquet(file, stamp)
    group = next((g for g, start in enumerate(starts[1:]) if row < start), None)
    if group is None:
        raise OSError(None, f"the file has {starts[-1]} rows")
    try:
        value = _row_group(file, stamp, group, column)[row - starts[group]].as_py()
    except (ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{file}: row {row}: column {column!r} is damaged: {error}") from error
    if item is not None and value is not None:
        value = value[int(item)] if int(item) < len(value) else None
    if isinstance(value, dict):  # a Hugging Face image: {"bytes": .., "path": ..}
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise DataError(f"{file}: row {row}: column {column!r} holds no bytes; store images in it")
    return value


@lru_cache(maxsize=16)
def _parquet(file: str, stamp: State | None) -> tuple[pq.ParquetFile, list[int]]:
    """A Parquet file and the first row of each of its row groups, and their end."""
    parquet = open_parquet(file)
    starts = [0]
    for group in range(parquet.num_row_groups):
        starts.append(starts[-1] + parquet.metadata.row_group(group).num_rows)
    return parquet, starts


@lru_cache(maxsize=KEPT_ROW_GROUPS)
def _row_group(file: str, stamp: State | None, group: int, column: str) -> pa.ChunkedArray:
    return _parquet(file, stamp)[0].read_row_group(group, columns=[column]).column(column)
