"""The formats of a source, each as records in LLaVA's form whose images are locations.

Text is read here; of images only their places are noted, and nothing is unpacked. Names inside an
archive are names in messages and never paths, and those that would lead out of it are refused.
"""

import itertools
import json
import math
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import path as paths
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_asvr.config.schema import SourceConfig
from megatron_asvr.data import locations
from megatron_asvr.data.text import IMAGE_TOKEN
from megatron_asvr.errors import DataError

IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif", "avif", "ppm"),
)
IMAGE_COLUMNS = ("image", "images")  # of a Parquet file; the first that exists
TEXT_COLUMNS = ("conversations", "caption", "text")
MAX_TEXT_BYTES = 16 * 2**20  # of one text in an archive: JSON can unfold into far more memory
MAX_GROUP_BYTES = 4 * 2**30  # of a row group of a Parquet file, which is read whole
ROWS = 64  # of a Parquet file, read at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One record, not yet checked.

    Attributes:
        where: file and place, for messages.
        raw: what LLaVA's JSON would hold.
        folder: image names are relative to it.
    """

    where: str
    raw: Any
    folder: str = ""


def data_files(source: SourceConfig) -> list[str]:
    """The files that make up a source, in order; a folder of images is one.

    Raises:
        DataError: nothing matches a pattern.
    """
    return [source.path] if source_format(source) == "images" else locations.expand(source.path)


def source_format(source: SourceConfig) -> str:
    """The format that is set, or that the path's ending tells."""
    if source.format is not None:
        return source.format
    ending = source.path.rsplit(".", 1)[-1].lower()
    known = {"tar": "webdataset", "parquet": "parquet", "jsonl": "jsonl", "json": "json"}
    if ending in known:
        return known[ending]
    if source.path.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise DataError(f"{source.path} is compressed: decompress it to .tar, for random access")
    return "images" if source.path.endswith("/") or paths.isdir(source.path) else "json"


def scan(source: SourceConfig, file: str, left_out: Counter[str]) -> Iterator[Found]:
    """The records of one of a source's files, in order.

    Args:
        source: it belongs to.
        file: or folder.
        left_out: gets the endings of files and members that are neither images nor text.

    Raises:
        DataError: the file cannot be read or has another format.
    """
    try:
        yield from _READERS[source_format(source)](file, source, left_out)
    except OSError as error:
        raise DataError(f"data file {file} cannot be read: {error.strerror or error}") from error
    except (ValueError, ArithmeticError, pa.ArrowException) as error:
        raise DataError(f"data file {file} is damaged: {error}; make or copy it again") from error


def load_json(text: bytes | str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        DataError: it is none, is nested too deeply, has a key twice, or numbers that are none.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite
        )
    except RecursionError:
        raise DataError(f"{where} is JSON that is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice[:40]!r} twice")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _image_folder(file: str, source: SourceConfig) -> str:
    if source.images is not None:
        return source.images
    return file.rpartition("/")[0] if locations.is_url(file) else str(Path(file).parent)


def _json(file: str, source: SourceConfig, _: Counter[str]) -> Iterator[Found]:
    value = load_json(locations.read(file), f"data file {file}")
    if not isinstance(value, list):
        raise DataError(
            f"data file {file} holds a {type(value).__name__}; wanted a list of records"
        )
    folder = _image_folder(file, source)
    for index, raw in enumerate(value):
        yield Found(where=f"{file}: record {index}", raw=raw, folder=folder)


def _jsonl(file: str, source: SourceConfig, _: Counter[str]) -> Iterator[Found]:
    folder = _image_folder(file, source)
    with locations.open_file(file) as lines:
        for number in itertools.count(1):
            line = lines.readline(MAX_TEXT_BYTES + 1)
            if not line:
                return
            where = f"{file}: line {number}"
            if len(line) > MAX_TEXT_BYTES:
                raise DataError(f"{where} has more than {MAX_TEXT_BYTES} bytes; divide the record")
            if line.strip():
                yield Found(where=where, raw=load_json(line, where), folder=folder)


def _images(folder: str, source: SourceConfig, left_out: Counter[str]) -> Iterator[Found]:
    found = locations.below(folder)
    images = [name for name in found if _suffix(name) in IMAGE_SUFFIXES]
    if not images:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    left_out.update(_suffix(name) for name in found if _suffix(name) not in IMAGE_SUFFIXES)
    for name in images:
        raw = {"id": name.removeprefix(folder).lstrip("/"), "image": name, "conversations": []}
        yield Found(where=name, raw=_with_text(raw, None))


def _webdataset(file: str, source: SourceConfig, left_out: Counter[str]) -> Iterator[Found]:
    """The samples of a shard: members in a row whose names are equal up to their endings."""
    size = locations.state(file)[0]
    with locations.open_file(file) as stream:
        try:
            with tarfile.open(fileobj=_Headers(stream, file), mode="r:") as tar:
                members = (m for m in tar if _is_data(m, file, size, left_out))
                for key, group in itertools.groupby(members, lambda m: _split(m.name)[0]):
                    yield _sample(file, key, list(group), left_out)
        except tarfile.TarError as error:
            raise DataError(
                f"data file {file} is not a complete, uncompressed tar: {error}"
            ) from error


class _Headers:
    """A tar file of which no header claims more than a text may have; what tarfile reads of it.

    Args:
        stream: the opened file.
        file: its name, for messages.
    """

    def __init__(self, stream: IO[bytes], file: str) -> None:
        self._stream, self._file = stream, file
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        """The next bytes.

        Raises:
            DataError: they are far more than a header has.
        """
        if not 0 <= size <= MAX_TEXT_BYTES:
            raise DataError(
                f"{self._file}: a header at byte {self.tell()} claims {size} bytes; make the "
                "archive anew"
            )
        return self._stream.read(size)


def _is_data(member: tarfile.TarInfo, file: str, size: int, left_out: Counter[str]) -> bool:
    """Whether a member holds data; raises where an archive is up to something."""
    name = member.name
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"{file}: member {name!r} leads out of the archive; make it anew without")
    if member.isdir():
        return False
    if not member.isreg() or member.issparse():
        raise DataError(f"{file}: member {name!r} is a link, a device or sparse; only files may be")
    if member.size < 0:
        raise DataError(f"{file}: member {name!r} claims {member.size} bytes; make it anew")
    if member.offset_data + member.size > size:
        raise DataError(f"{file}: truncated in member {name!r}; copy the file again")
    named = not paths.basename(name).startswith(".") and "." in paths.basename(name)
    left_out.update([] if named else [_suffix(name)])
    return named


def _split(name: str) -> tuple[str, str]:
    """Key and ending of a member, divided at the first dot behind the folders."""
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, ending.lower()


def _suffix(name: str) -> str:
    return paths.basename(name).rpartition(".")[2].lower()


def _sample(
    file: str, key: str, members: Sequence[tarfile.TarInfo], left_out: Counter[str]
) -> Found:
    where = f"{file}: sample {key!r}"
    texts = {_split(m.name)[1]: m for m in members if _split(m.name)[1] in ("json", "txt")}
    images = [
        locations.part(file, m.offset_data, m.size)
        for m in members
        if _suffix(m.name) in IMAGE_SUFFIXES
    ]
    others = (m.name for m in members if _suffix(m.name) not in IMAGE_SUFFIXES)
    left_out.update(end for name in others if (end := _split(name)[1]) not in ("json", "txt"))
    raw: dict[str, Any] = {"id": key, "image": images}
    if "json" in texts:
        stored = load_json(_text(file, texts["json"], where), f"{where}: its .json")
        if isinstance(stored, dict) and "conversations" in stored:
            return Found(where=where, raw={**stored, "id": stored.get("id", key), "image": images})
        if "txt" not in texts:
            raise DataError(
                f"{where}: its .json has no 'conversations' and there is no .txt; add one of them, "
                "or leave the .json out for an image without a caption"
            )
    caption = _text(file, texts["txt"], where).decode("utf-8", "replace") if texts else None
    return Found(where=where, raw=_with_text(raw, caption))


def _text(file: str, member: tarfile.TarInfo, where: str) -> bytes:
    if member.size > MAX_TEXT_BYTES:
        raise DataError(
            f"{where}: {member.name!r} has {member.size} bytes; at most "
            f"{MAX_TEXT_BYTES} of text can belong to a sample"
        )
    return locations.read(locations.part(file, member.offset_data, member.size))


def _parquet(file: str, source: SourceConfig, _: Counter[str]) -> Iterator[Found]:
    parquet = locations.open_parquet(file)
    names = parquet.schema_arrow.names
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    text = next((name for name in TEXT_COLUMNS if name in names), None)
    wanted = [name for name in ("id", image, text) if name is not None and name in names]
    if image is None and text != "conversations":
        raise DataError(
            f"data file {file} has the columns {', '.join(names)}; wanted 'image' or 'images' "
            "(bytes), 'conversations', or both"
        )
    _check_claims(parquet, file, wanted)
    row = 0
    for batch in parquet.iter_batches(batch_size=ROWS, columns=wanted):
        places = _cells(file, row, batch, image)
        ids = batch.column("id").to_pylist() if "id" in wanted else [None] * len(batch)
        texts = _texts(file, row, batch, text)
        for name, images, said in zip(ids, places, texts, strict=True):
            where = f"{file}: row {row}"
            raw = {"image": images} | ({"id": name} if name is not None else {})
            if text == "conversations":
                talk = load_json(said, where) if isinstance(said, str) else said
                yield Found(where=where, raw={**raw, "conversations": talk})
            else:
                yield Found(where=where, raw=_with_text(raw, said))
            row += 1


def _check_claims(parquet: pq.ParquetFile, file: str, wanted: Sequence[str]) -> None:
    """Refuse a small file that unfolds into an enormous table."""
    rows, size = parquet.metadata.num_rows, locations.state(file)[0]
    if rows > size:
        raise DataError(f"data file {file} claims {rows} rows in {size} bytes; make it again")
    for number in range(parquet.num_row_groups):
        group = parquet.metadata.row_group(number)
        columns = (group.column(column) for column in range(group.num_columns))
        names = ((column.path_in_schema.split(".")[0], column) for column in columns)
        claimed = sum(c.total_uncompressed_size for name, c in names if name in wanted)
        if claimed > MAX_GROUP_BYTES:
            raise DataError(
                f"data file {file}: row group {number} has {claimed} bytes, and a row group is "
                f"read whole: at most {MAX_GROUP_BYTES}; write it with a smaller row_group_size"
            )


def _texts(file: str, first: int, batch: pa.RecordBatch, column: str | None) -> list[Any]:
    """Every row's text or conversation."""
    if column is None:
        return [None] * len(batch)
    values = batch.column(column)
    if not _short(values.dictionary if isinstance(values, pa.DictionaryArray) else values):
        raise DataError(
            f"data file {file}: rows {first} to {first + len(batch) - 1}: a {column!r} has more "
            f"than {MAX_TEXT_BYTES} bytes of text"
        )
    return values.to_pylist()


def _short(values: pa.Array) -> bool:
    """Whether no text of a column is longer than a sample may have."""
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return True
    return (pc.max(pc.binary_length(values)).as_py() or 0) <= MAX_TEXT_BYTES


def _cells(file: str, first: int, batch: pa.RecordBatch, column: str | None) -> list[list[str]]:
    """Locations of every row's images; their bytes are not looked at."""
    if column is None:
        return [[] for _ in range(len(batch))]
    values = batch.column(column)
    rows = range(first, first + len(batch))
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        counts = pc.fill_null(pc.list_value_length(values), 0).to_pylist()
        return [
            [locations.cell(file, row, column, item) for item in range(count)]
            for row, count in zip(rows, counts, strict=True)
        ]
    there = values.is_valid().to_pylist()
    return [
        [locations.cell(file, row, column)] if valid else []
        for row, valid in zip(rows, there, strict=True)
    ]


def _with_text(raw: dict[str, Any], caption: str | None) -> dict[str, Any]:
    """The record with a caption as the answer; without one it has images only."""
    images = raw["image"] if isinstance(raw["image"], list) else [raw["image"]]
    turns = [{"from": "human", "value": "\n".join([IMAGE_TOKEN] * len(images))}]
    if caption is not None and caption.strip():
        turns.append({"from": "gpt", "value": caption.replace(IMAGE_TOKEN, " ")})
    return {**raw, "conversations": turns}


_READERS: dict[str, Callable[[str, SourceConfig, Counter[str]], Iterator[Found]]] = {
    "json": _json,
    "jsonl": _jsonl,
    "webdataset": _webdataset,
    "parquet": _parquet,
    "images": _images,
}
