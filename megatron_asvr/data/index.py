"""What is known about every sample before a run: made once by `asvr data index`, mapped by loaders.

    <cache>/index-<sources and image rules>/
        samples-<hash>.arrow   one a data file: id, kind, turns, images, lengths of each sample
        <hash>.arrow           content key and state of every image, in the order of the samples
        <tokenizer, template, lengths>/
            manifest.json      counts, and which files are the index; written last, so it is whole
            bad_samples.jsonl  each bad sample and why

A data file whose size and time are as before keeps its table, and an image that is known in
its present state is not read again (data/images.py): making the index again, or going on after a
kill, does only what is missing.
"""

import copy
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from megatron_asvr.config.schema import Config, SourceConfig
from megatron_asvr.data import locations
from megatron_asvr.data.cache import cache_root
from megatron_asvr.data.conversation import Turn
from megatron_asvr.data.files import fingerprint, read_table, write_atomically, write_table
from megatron_asvr.data.formats import data_files, source_format
from megatron_asvr.data.images import (
    Entry,
    ImageIndex,
    Run,
    image_rules,
    state_columns,
    state_entries,
)
from megatron_asvr.data.records import Record, raise_problems, records_of
from megatron_asvr.data.samples import KINDS, DataFile, left_out_of, write_samples
from megatron_asvr.data.templates import find_template
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.data.views import ImageLayouts, Size
from megatron_asvr.errors import DataError
from megatron_asvr.log import Progress

VERSION = 5
MANIFEST = "manifest.json"
BAD_SAMPLES = "bad_samples.jsonl"
OVERLONG = "nothing of it fits into data.max_length"


def index_folder(config: Config, sources: Sequence[SourceConfig]) -> Path:
    """Where the index of some sources is kept."""
    listed = [
        [s.name, s.path, locations.absolute(s.path), s.images, source_format(s)] for s in sources
    ]
    name = fingerprint({"sources": listed, "rules": image_rules(config), "version": VERSION})
    return cache_root(config) / f"index-{name[:16]}"


def text_rules(config: Config, tokenizer: TextTokenizer) -> str:
    """Hash of everything that the lengths of samples depend on."""
    data = config.data
    return fingerprint(
        {
            "tokenizer": tokenizer.fingerprint,
            "template": find_template(data.template, tokenizer).text,
            "max_length": data.max_length,
            "on_overlong": data.on_overlong,
            "num_patches": config.model.vision.num_patches,
            "official": config.loss.mode == "official",
            **_resolution_rules(config),
        }
    )


def _resolution_rules(config: Config) -> dict[str, Any]:
    """What the number of an image's positions depends on beside the encoder's patches."""
    if not ImageLayouts(config.model).needs_sizes:
        return {}
    return {**asdict(config.model.resolution), "image_size": config.model.vision.image_size}


def list_files(sources: Iterable[SourceConfig]) -> list[DataFile]:
    """The files of some sources as they are now, in order.

    Raises:
        DataError: a file is missing.
    """
    found = []
    for number, source in enumerate(sources):
        is_folder = source_format(source) == "images"
        for path in data_files(source):
            try:
                state = _folder_state(path) if is_folder else locations.state(path)
            except OSError as error:
                why = error.strerror or error
                raise DataError(f"data file {path} cannot be read: {why}") from error
            found.append(DataFile(number=number, source=source, path=path, state=state))
    return found


def build(
    config: Config,
    sources: Sequence[SourceConfig],
    tokenizer: TextTokenizer,
    *,
    device: torch.device,
    run: Run = map,
) -> dict[str, Any]:
    """The manifest of an index that is now complete.

    Args:
        config: the run's configuration.
        sources: what is indexed.
        tokenizer: gives the lengths.
        device: where images are test-decoded.
        run: a ``map`` that shares the work among processes.

    Raises:
        DataError: a file cannot be read, or records have the wrong form.
    """
    folder, files = index_folder(config, sources), list_files(sources)
    rules = text_rules(config, tokenizer)
    checked = ImageIndex(config, folder=cache_root(config), device=device)
    sizes = _image_sizes(config, files, checked, run)
    parts = [_part(folder, file, rules, of) for file, of in zip(files, sizes, strict=True)]
    jobs = [job for job in zip(files, parts, sizes, strict=True) if read_table(job[1]) is None]
    _write_tables(partial(write_samples, config, str(tokenizer.path)), jobs, run)
    tables = [_open(part) for part in parts]
    images = [path for table in tables for path in pc.list_flatten(table["images"]).to_pylist()]
    checked.prepare(images, run=run)
    state = write_table(folder, pa.table(state_columns([checked.entries[path] for path in images])))
    counts, lines = [], []
    for number, source in enumerate(sources):
        own = [t for file, t in zip(files, tables, strict=True) if file.number == number]
        bad = [list(_bad_samples(table, checked.entries)) for table in own]
        num_bad = sum(len({row for row, _ in found}) for found in bad)
        counts.append({"name": source.name or source.path, **_count(own), "bad_samples": num_bad})
        lines += [
            {"source": source.name or source.path, **line} for found in bad for _, line in found
        ]
    own_folder = folder / rules[:16]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(own_folder / BAD_SAMPLES, text.encode())
    manifest = {
        "version": VERSION,
        "lengths": rules,
        "sources": counts,
        "files": [[file.path, *file.state] for file in files],
        "parts": [part.name for part in parts],
        "images": state.name,
        "bad_samples": str(own_folder / BAD_SAMPLES),
    }
    write_atomically(own_folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    _forget(folder, manifest["files"])
    return manifest


def _write_tables(
    write: Callable[..., list[str]],
    jobs: Sequence[tuple[DataFile, Path, dict[str, Size]]],
    run: Run,
) -> None:
    progress = Progress("text measured", len(jobs), unit="data files")
    for (file, *_), problems in zip(jobs, run(write, jobs), strict=True):
        progress.add(1)
        if problems is None:
            raise DataError(f"a process died measuring {file.path}; memory may have run out")
        raise_problems(problems, f"records of {file.path} have the wrong form")


class Index:
    """The index of some sources, mapped.

    Attributes:
        folder: it lies in.
        manifest: its counts and files.
        samples: the table that data/samples.py describes.
        images: locations of the images of every sample.
        records: every sample's record, read when it is asked for.
        sizes: number of samples of every source.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.samples = pa.concat_tables(_open(folder / name) for name in manifest["parts"])
        self._states = _open(folder / manifest["images"])
        self.images: list[list[str]] = self.samples["images"].to_pylist()
        self.records = IndexedRecords(self.samples)
        self.sizes: list[int] = [source["samples"] for source in manifest["sources"]]

    def entries(self) -> dict[str, Entry]:
        """What was found about every image, by location."""
        paths = (path for images in self.images for path in images)
        states = state_entries(self._states.to_pydict(), itertools.repeat(0), itertools.repeat(0))
        return dict(zip(paths, states, strict=True))

    def lengths(self, rules: str, *, branches: bool) -> "Lengths | None":
        """Lengths of the rows of every sample, or None when they were made by other rules."""
        if rules != self.manifest["lengths"]:
            return None
        return Lengths(self.samples["lengths" if branches else "flat_lengths"])


class IndexedRecords(Sequence[Record]):
    """Records of an index, each read when it is asked for."""

    def __init__(self, samples: pa.Table) -> None:
        self._samples = samples
        self._columns = [samples[name] for name in ("id", "images", "turns")]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: Any) -> Any:
        name, images, turns = (column[number].as_py() for column in self._columns)
        talks = tuple(tuple(Turn(**turn) for turn in talk) for talk in turns)
        return Record(id=name, images=tuple(images), conversations=talks)

    def num_conversations(self) -> np.ndarray:
        """Conversations of every record."""
        return pc.list_value_length(self._columns[2]).to_numpy()


class Lengths(Sequence[list[int]]):
    """Lengths of the rows of every sample; none for one that does not fit."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._counts = pc.list_value_length(column).to_numpy()
        self._ends = np.cumsum(self._counts)
        self._values = pc.list_flatten(column).to_numpy()

    def chosen(self, numbers: np.ndarray) -> "Lengths":
        """Those of some samples."""
        made = copy.copy(self)
        made._counts, made._ends = self._counts[numbers], self._ends[numbers]
        return made

    def empty(self) -> list[int]:
        """The samples that do not fit."""
        return np.flatnonzero(self._counts == 0).tolist()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: Any) -> Any:
        end = self._ends[number]
        return self._values[end - self._counts[number] : end].tolist()


def open_index(
    config: Config, sources: Sequence[SourceConfig], tokenizer: TextTokenizer | None = None
) -> Index | None:
    """The index of some sources, or None when there is none.

    Args:
        config: the run's configuration.
        sources: what was indexed.
        tokenizer: the index made with it is preferred, for its lengths; any other has the records.

    Raises:
        DataError: data files changed since it was made, or it is damaged.
    """
    folder = index_folder(config, sources)
    found = sorted(folder.glob(f"*/{MANIFEST}"))
    if not found:
        return None
    rules = text_rules(config, tokenizer) if tokenizer is not None else ""
    path = next((path for path in found if path.parent.name == rules[:16]), found[0])
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is damaged; run `asvr data index` again") from error
    now = {file.path: list(file.state) for file in list_files(sources)}
    then = {path: state for path, *state in manifest["files"]}
    changed = sorted(path for path in now.keys() | then.keys() if now.get(path) != then.get(path))
    if changed:
        raise DataError(
            f"{len(changed)} data files changed since they were indexed in {folder} "
            f"({', '.join(changed[:3])}); run `asvr data index` again, or remove that folder"
        )
    return Index(folder, manifest)


def _folder_state(folder: str) -> tuple[int, int]:
    names = locations.below(folder)
    return len(names), int(fingerprint({"names": names})[:15], 16)


def _image_sizes(
    config: Config, files: Sequence[DataFile], checked: ImageIndex, run: Run
) -> list[dict[str, Size]]:
    """Sizes of the images of each data file, by path, where the lengths of samples need them."""
    if not ImageLayouts(config.model).needs_sizes:
        return [{} for _ in files]
    listed = [
        dict.fromkeys(
            path
            for record in records_of(file.source, file.path, Counter())[0]
            for path in record.images
        )
        for file in files
    ]
    checked.prepare(dict.fromkeys(path for paths in listed for path in paths), run=run)
    return [{path: checked.entries[path].shape for path in paths} for paths in listed]


def _part(folder: Path, file: DataFile, rules: str, sizes: dict[str, Size]) -> Path:
    """Where a data file's table is: the name says everything that it depends on."""
    source = file.source
    facts = [file.path, file.state, source.images, source_format(source), rules]
    if sizes:
        facts.append(sorted(sizes.items()))
    return folder / f"samples-{fingerprint({'facts': facts})[:32]}.arrow"


def _bad_samples(
    table: pa.Table, entries: dict[str, Entry]
) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Number, and then id, image and reason, of every sample that cannot be used."""
    columns = (table[name].to_pylist() for name in ("id", "images", "lengths"))
    for row, (name, images, lengths) in enumerate(zip(*columns, strict=True)):
        bad = [(image, entries[image].problem) for image in images if entries[image].problem]
        if not bad and not lengths:
            bad = [(None, OVERLONG)]
        for image, why in bad:
            yield row, {"id": name, "image": image, "reason": why}


def _count(tables: Sequence[pa.Table]) -> dict[str, Any]:
    """Counts of one source."""
    kinds = Counter(kind for table in tables for kind in table["kind"].to_pylist())
    return {
        "samples": sum(len(table) for table in tables),
        **{kind: kinds[kind] for kind in KINDS},
        "images": sum(len(pc.list_flatten(table["images"])) for table in tables),
        "text_tokens": sum(pc.sum(table["text_tokens"]).as_py() or 0 for table in tables),
        "left_out": dict(sum(map(left_out_of, tables), Counter())),
    }


def _open(path: Path) -> pa.Table:
    table = read_table(path)
    if table is None:
        raise DataError(f"{path} is absent or damaged; run `asvr data index` again")
    return table


def _forget(folder: Path, files: list[list[Any]]) -> None:
    """Remove what was made of the files as they were; who has mapped a table keeps it."""
    kept = set()
    for path in folder.glob(f"*/{MANIFEST}"):
        try:
            manifest = json.loads(path.read_bytes())
        except ValueError:
            manifest = {"files": None}
        if manifest["files"] == files:
            kept |= {*manifest["parts"], manifest["images"]}
        else:
            path.unlink()
    for path in folder.glob("*.arrow"):
        if path.name not in kept:
            path.unlink(missing_ok=True)
