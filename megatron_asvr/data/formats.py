"""The formats of a source, each as records in LLaVA's form whose images are locations.

Text is read here; of images only their places are noted, and nothing is unpacked. Names inside an
archive are names in messages and never paths, and those that would lead out of it are refused.
"""

import itertools
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import path as paths
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from megatron_asvr.config.schema import SourceConfig
from megatron_asvr.data import locations
from megatron_asvr.data.text import IMAGE_TOKEN
from megatron_asvr.errors import DataError

IMAGE_SUFFIXES = ("jpg", "jpeg", "jpe", "png", "webp", "bmp", "tif", "tiff", "gif", "avif", "ppm")
IMAGE_COLUMNS = ("image", "images")  # of a Parquet file; the first that exists
TEXT_COLUMNS = ("conversations", "caption", "text")
MAX_TEXT_BYTES = 16 * 2**20  # of one text in an archive: JSON can unfold into far more memory
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


def scan(source: SourceConfig, file: str) -> Iterator[Found]:
    """The records of one of a source's files, in order.

    Raises:
        DataError: the file cannot be read or has another format.
    """
    try:
        yield from _READERS[source_format(source)](file, source)
    except OSError as error:
        raise DataError(f"data file {file} cannot be read: {error.strerror or error}") from error
    except (ValueError, ArithmeticError, pa.ArrowException) as error:
        raise DataError(f"data file {file} is damaged: {error}; make or copy it again") from error


def load_json(text: bytes | str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        DataError: it is none, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise DataError(f"{where} is JSON that is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}") from error


def _image_folder(file: str, source: SourceConfig) -> str:
    if source.images is not None:
        return source.images
    return file.rpartition("/")[0] if locations.is_url(file) else str(Path(file).parent)


def _json(file: str, source: SourceConfig) -> Iterator[Found]:
    value = load_json(locations.read(file), f"data file {file}")
    if not isinstance(value, list):
        raise DataError(
            f"data file {file} holds a {type(value).__name__}; wanted a list of records"
        )
    folder = _image_folder(file, source)
    for index, raw in enumerate(value):
        yield Found(where=f"{file}: record {index}", raw=raw, folder=folder)


def _jsonl(file: str, source: SourceConfig) -> Iterator[Found]:
    folder = _image_folder(file, source)
    with locations.open_file(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{file}: line {number}"
                yield Found(where=where, raw=load_json(line, where), folder=folder)


def _images(folder: str, source: SourceConfig) -> Iterator[Found]:
    found = [name for name in locations.below(folder) if _suffix(name) in IMAGE_SUFFIXES]
    if not found:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    for name in found:
        raw = {"id": name.removeprefix(folder).lstrip("/"), "image": name, "conversations": []}
        yield Found(where=name, raw=_with_text(raw, None))


def _webdataset(file: str, source: SourceConfig) -> Iterator[Found]:
    """The samples of a shard: members in a row whose names are equal up to their endings."""
    size = locations.state(file)[0]
    with locations.open_file(file) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                members = (m for m in tar if _is_data(m, file, size))
                for key, group in itertools.groupby(members, lambda m: _split(m.name)[0]):
                    yield _sample(file, key, list(group), tar)
        except tarfile.TarError as error:
            raise DataError(
                f"data file {file} is not a complete, uncompressed tar: {error}"
            ) from error


def _is_data(member: tarfile.TarInfo, file: str, size: int) -> bool:
    """Whether a member holds data; raises where an archive is up to something."""
    name = member.name
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"{file}: member {name!r} leads out of the archive; make it anew without")
    if member.isdir():
        return False
    if not member.isreg() or member.issparse():
        raise DataError(f"{file}: member {name!r} is a link, a device or sparse; only files may be")
    if member.offset_data + member.size > size:
        raise DataError(f"{file}: truncated in member {name!r}; copy the file again")
    return not paths.basename(name).startswith(".") and "." in paths.basename(name)


def _split(name: str) -> tuple[str, str]:
    """Key and ending of a member, divided at the first dot behind the folders."""
    folder, _, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, ending.lower()


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _sample(file: str, key: str, members: Sequence[tarfile.TarInfo], tar: tarfile.TarFile) -> Found:
    where = f"{file}: sample {key!r}"
    texts = {_split(m.name)[1]: m for m in members if _split(m.name)[1] in ("json", "txt")}
    images = [
        locations.part(file, m.offset_data, m.size)
        for m in members
        if _suffix(m.name) in IMAGE_SUFFIXES
    ]
    raw: dict[str, Any] = {"id": key, "image": images}
    if "json" in texts:
        stored = load_json(_text(tar, texts["json"], where), f"{where}: its .json")
        if isinstance(stored, dict) and "conversations" in stored:
            return Found(where=where, raw={**stored, "id": stored.get("id", key), "image": images})
        if "txt" not in texts:
            raise DataError(
                f"{where}: its .json has no 'conversations' and there is no .txt; add one of them, "
                "or leave the .json out for an image without a caption"
            )
    caption = _text(tar, texts["txt"], where).decode("utf-8", "replace") if texts else None
    return Found(where=where, raw=_with_text(raw, caption))


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> bytes:
    stream = tar.extractfile(member) if member.size <= MAX_TEXT_BYTES else None
    if stream is None:
        raise DataError(
            f"{where}: {member.name!r} has {member.size} bytes; at most "
            f"{MAX_TEXT_BYTES} of text can belong to a sample"
        )
    return stream.read()


def _parquet(file: str, source: SourceConfig) -> Iterator[Found]:
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
    row = 0
    for batch in parquet.iter_batches(batch_size=ROWS, columns=wanted):
        places = _cells(file, row, batch, image)
        ids = batch.column("id").to_pylist() if "id" in wanted else [None] * len(batch)
        texts = batch.column(text).to_pylist() if text is not None else [None] * len(batch)
        for name, images, said in zip(ids, places, texts, strict=True):
            where = f"{file}: row {row}"
            raw = {"image": images} | ({"id": name} if name is not None else {})
            if text == "conversations":
                talk = load_json(said, where) if isinstance(said, str) else said
                yield Found(where=where, raw={**raw, "conversations": talk})
            else:
                yield Found(where=where, raw=_with_text(raw, said))
            row += 1


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


_READERS: dict[str, Callable[[str, SourceConfig], Iterator[Found]]] = {
    "json": _json,
    "jsonl": _jsonl,
    "webdataset": _webdataset,
    "parquet": _parquet,
    "images": _images,
}
