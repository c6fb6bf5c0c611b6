"""The table of one data file's samples: its records, and the lengths that they will have."""

import itertools
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_asvr.config.schema import Config, SourceConfig
from megatron_asvr.data.files import write_table
from megatron_asvr.data.records import Record, records_of
from megatron_asvr.data.sample import SampleBuilder
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.data.views import Size

KINDS = ("text", "one-image", "multi-image", "caption-free")

LEFT_OUT = b"left_out"  # in the table's metadata
BATCH = 8192  # samples turned into columns at a time

# Large lists: the text of one file may exceed 2 GiB.
_TURN = pa.struct([("role", pa.string()), ("text", pa.large_string())])
_TURNS = pa.large_list(pa.large_list(_TURN))
_SAMPLES = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("turns", _TURNS),
        ("images", pa.list_(pa.string())),
        ("text_tokens", pa.int32()),
        ("cut_tokens", pa.int32()),
        ("lengths", pa.list_(pa.int32())),  # of its rows, as long as attention keeps branches apart
        ("flat_lengths", pa.list_(pa.int32())),  # of its rows, one a conversation
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """One file of a source.

    Attributes:
        number: of the source that it belongs to.
        source: that source.
        path: of the file.
        state: in which it is (a folder: what it lists).
    """

    number: int
    source: SourceConfig
    path: str
    state: tuple[int, int]


def kind_of(record: Record) -> str:
    """One of ``KINDS``."""
    if not record.images:
        return "text"
    if not any(turn.role == "assistant" for turns in record.conversations for turn in turns):
        return "caption-free"
    return "multi-image" if len(record.images) > 1 else "one-image"


def write_samples(
    config: Config, tokenizer: str, job: tuple[DataFile, Path, dict[str, Size]]
) -> list[str]:
    """Write the table of one data file; what is wrong with its records, and then nothing.

    Args:
        config: the run's configuration.
        tokenizer: path of the text tokenizer.
        job: the file, its table, and the sizes of its images where lengths need them.
    """
    file, part, sizes = job
    text = TextTokenizer(tokenizer)
    left_out: Counter[str] = Counter()
    records, problems = records_of(file.source, file.path, left_out)
    if problems:
        return problems
    branched, flat = (SampleBuilder(config, text, branches=branches) for branches in (True, False))
    rows = (_row(record, branched, flat, sizes) for record in records)
    batches = []
    while chunk := list(itertools.islice(rows, BATCH)):
        batches.append(pa.RecordBatch.from_pylist(chunk, schema=_SAMPLES))
    table = pa.Table.from_batches(batches, schema=_SAMPLES)
    table = table.replace_schema_metadata({LEFT_OUT: json.dumps(left_out)})
    write_table(part.parent, table, part.stem)
    return []


def left_out_of(table: pa.Table) -> Counter[str]:
    """Files and members that the records were not made of, by their endings."""
    return Counter(json.loads((table.schema.metadata or {})[LEFT_OUT]))


def _row(
    record: Record, branched: SampleBuilder, flat: SampleBuilder, known: dict[str, Size]
) -> dict[str, Any]:
    sizes = [known[path] for path in record.images] if known else []
    sample = branched.build(record, sizes)
    alone = flat.build(record, sizes) if len(record.conversations) > 1 else sample
    return {
        "id": record.id,
        "kind": kind_of(record),
        "turns": [[asdict(turn) for turn in talk] for talk in record.conversations],
        "images": record.images,
        "text_tokens": sample.text_tokens,
        "cut_tokens": sample.cut_tokens,
        "lengths": [row.length for row in sample.rows],
        "flat_lengths": [row.length for row in alone.rows],
    }
