"""Sources to checked records, read once, before any training time is spent.

Every format (data/formats.py) comes down to LLaVA's: a record is
``{"id": .., "image": "a.png" | ["a.png", ..], "conversations": [..]}``; ``image`` may be absent.
``conversations`` is a list of ``{"from": "human" | "gpt", "value": ".."}`` turns, or a list of such
lists: independent conversations about the same images.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_asvr.config.schema import SourceConfig
from megatron_asvr.data import locations
from megatron_asvr.data.conversation import Turn
from megatron_asvr.data.formats import data_files, scan
from megatron_asvr.data.text import IMAGE_TOKEN
from megatron_asvr.errors import DataError

logger = logging.getLogger(__name__)

SHOWN = 5  # problems listed in one error message

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One checked record.

    Attributes:
        id: the record's own id, or ``file:index`` when it has none.
        images: their locations (data/locations.py), image folder included.
        conversations: at least one; with several of them, each begins with all the images.
    """

    id: str
    images: tuple[str, ...]
    conversations: tuple[tuple[Turn, ...], ...]


def read_records(sources: Sequence[SourceConfig]) -> list[Record]:
    """The records of all sources, in order; see :func:`read_sources`."""
    return [record for part in read_sources(sources) for record in part]


def read_sources(sources: Sequence[SourceConfig]) -> list[list[Record]]:
    """The records of every source, in order.

    Raises:
        DataError: a file is missing or has another format, or records have the wrong form (the
            first few are named by file, index, id and key, with the number of all).
    """
    parts: list[list[Record]] = []
    problems: list[str] = []
    left_out: Counter[str] = Counter()
    for source in sources:
        parts.append([])
        for file in data_files(source):
            good, wrong = records_of(source, file, left_out)
            parts[-1] += good
            problems += wrong
    if left_out:
        logger.warning("left out, because they are neither images nor text: %s", named(left_out))
    raise_problems(problems, "records have the wrong form")
    if sources and not any(parts):
        raise DataError(f"{', '.join(s.path for s in sources)}: no records; the list is empty")
    return parts


def named(left_out: Mapping[str, int]) -> str:
    """How many files of which endings are left out."""
    return ", ".join(f"{number} .{ending}" for ending, number in sorted(left_out.items()))


def records_of(
    source: SourceConfig, file: str, left_out: Counter[str]
) -> tuple[list[Record], list[str]]:
    """The good records of one of a source's files, and what is wrong with the others.

    Args:
        source: it belongs to.
        file: or folder.
        left_out: gets the endings of files and members that are neither images nor text.
    """
    records: list[Record] = []
    problems: list[str] = []
    for found in scan(source, file, left_out):
        try:
            records.append(parse_record(found.raw, where=found.where, folder=found.folder))
        except DataError as error:
            problems.append(str(error))
    return records, problems


def parse_record(raw: Any, *, where: str, folder: str | Path) -> Record:
    """The checked form of one JSON record.

    Args:
        raw: what JSON gave.
        where: file and index, for error messages.
        folder: image paths are relative to it.

    Raises:
        DataError: a key is missing or has the wrong type, or ``<image>`` does not fit ``image``.
    """
    if not isinstance(raw, dict):
        raise DataError(f"{where} is {_kind(raw)}; wanted an object with 'conversations'")
    name = raw.get("id", where)
    if not isinstance(name, str | int):
        raise DataError(f"{where}: 'id' is {_kind(name)}; wanted a string or a number")
    if "id" in raw:
        where = f"{where} (id {name!r})"
    images = _images(raw.get("image"), where)
    value = raw.get("conversations")
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'conversations' is {_kind(value)}; wanted a non-empty list")
    if isinstance(value[0], list):
        parsed = [_turns(c, f"{where}: conversations[{k}]") for k, c in enumerate(value)]
        conversations = tuple(_images_first(c, len(images), where) for c in parsed)
    else:
        conversations = (_turns(value, f"{where}: conversations"),)
        _check_count(conversations[0], len(images), where)
    answered = any(t.role == "assistant" for c in conversations for t in c)
    if not images and not answered:
        raise DataError(
            f"{where} has neither an image nor an answer: nothing can be learnt from it"
        )
    return Record(
        id=str(name),
        images=tuple(locations.join(folder, i) for i in images),
        conversations=conversations,
    )


def raise_problems(problems: Sequence[str], title: str) -> None:
    """Raise one DataError that lists the first few problems and the number of all.

    Raises:
        DataError: ``problems`` is not empty.
    """
    if problems:
        listed = "\n  ".join(problems[:SHOWN])
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError(f"{len(problems)} {title}:\n  {listed}{more}")


def _images(value: Any, where: str) -> list[str]:
    if value is None:
        return []
    images = [value] if isinstance(value, str) else value
    if not isinstance(images, list) or not all(isinstance(i, str) and i for i in images):
        raise DataError(f"{where}: 'image' is {_kind(value)}; wanted a path or a list of paths")
    return images


def _turns(value: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} is {_kind(value)}; wanted a non-empty list of turns")
    turns = tuple(_turn(raw, f"{where}[{k}]") for k, raw in enumerate(value))
    for k in range(1, len(turns)):
        if turns[k].role == turns[k - 1].role:
            raise DataError(f"{where}[{k}]: two turns in a row are from the {turns[k].role}")
    return turns


def _turn(raw: Any, where: str) -> Turn:
    if not isinstance(raw, dict):
        raise DataError(f"{where} is {_kind(raw)}; wanted an object with 'from' and 'value'")
    speaker, text = raw.get("from"), raw.get("value")
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise DataError(f"{where}: 'from' is {speaker!r}; use 'human' or 'gpt'")
    if not isinstance(text, str):
        raise DataError(f"{where}: 'value' is {_kind(text)}; wanted a string")
    if _ROLES[speaker] == "assistant" and IMAGE_TOKEN in text:
        raise DataError(f"{where}: {IMAGE_TOKEN} in an answer; only the human's turns may show it")
    return Turn(_ROLES[speaker], text.strip())


def _placeholders(turns: Iterable[Turn]) -> int:
    return sum(turn.text.count(IMAGE_TOKEN) for turn in turns)


def _check_count(turns: tuple[Turn, ...], num_images: int, where: str) -> None:
    count = _placeholders(turns)
    if count != num_images:
        raise DataError(
            f"{where}: {count} {IMAGE_TOKEN} in 'conversations' but {num_images} in 'image'; "
            "write one for each image"
        )


def _images_first(turns: tuple[Turn, ...], num_images: int, where: str) -> tuple[Turn, ...]:
    """The conversation with all placeholders at its very beginning, so that others can share it."""
    if _placeholders(turns) > 0:
        _check_count(turns, num_images, where)
    if not num_images:
        return turns
    if turns[0].role != "user":
        raise DataError(f"{where}: a conversation about an image must begin with the human")
    bare = [Turn(t.role, t.text.replace(IMAGE_TOKEN, " ").strip()) for t in turns]
    first = "\n".join([*[IMAGE_TOKEN] * num_images, *filter(None, [bare[0].text])])
    return (Turn("user", first), *bare[1:])


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    if value == []:
        return "an empty list"
    return f"of type {type(value).__name__} ({str(value)[:40]!r})"
