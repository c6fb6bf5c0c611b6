"""The visual tokenizer's codes on disk, so that each image is tokenised once.

A cache folder is named by a fingerprint of everything that the codes depend on, and holds the same
in words (``manifest.json``), so that a cache made otherwise is never used and the difference can be
told. Codes are found by the key of an image (data/views.py: its bytes, and which view of it this
is). They lie in part files (data/parts.py) that are written whole, never changed, and mapped
into memory; several jobs may read and write at a time.

``index-*.arrow`` holds the sorted keys of all parts with their places. Opening a cache lists the
folder and maps that file, whatever the number of images; without it the keys of all parts are read.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_asvr.config.schema import Config
from megatron_asvr.data.files import fingerprint, read_table, write_atomically, write_table
from megatron_asvr.data.parts import (
    FORMAT,
    KEY_BYTES,
    SUFFIX,
    DamagedPartError,
    Part,
    RowForm,
    write_part,
)
from megatron_asvr.data.pixels import pixel_facts
from megatron_asvr.data.views import stored_key
from megatron_asvr.errors import DataError

MANIFEST = "manifest.json"
INDEX = "index-{}.arrow"
ASIDE = ".damaged"  # ending of a part that was found damaged
SHOWN = 3  # other caches that a message compares with


def code_facts(config: Config, tokenizer: Mapping[str, Any], *, device: str) -> dict[str, Any]:
    """Everything that codes depend on beside the image, by name; a cache is of one set of them.

    Args:
        config: the run.
        tokenizer: ``VisualTokenizer.facts`` of the tokenizer that encodes.
        device: type of the device that decodes and encodes.
    """
    return {"format": FORMAT, **pixel_facts(config, device), **tokenizer}


def cache_root(config: Config) -> Path:
    """Folder of all caches: ``data.cache_dir``, or ``codes`` beside the run folder."""
    if config.data.cache_dir is not None:
        return Path(config.data.cache_dir)
    return Path(config.run.dir).parent / "codes"


class CodeCache:
    """Codes by image key.

    Args:
        root: folder of all caches.
        facts: from :func:`code_facts`.
        num_patches: patches of one image.
        codebook_sizes: of the tokenizer's depths; up to 65,536 each code takes two bytes.

    Attributes:
        damaged: part files that were found damaged, and why; their images are missing.

    Raises:
        DataError: the folder's manifest says that it is another cache.
    """

    def __init__(
        self,
        root: str | Path,
        facts: Mapping[str, Any],
        *,
        num_patches: int,
        codebook_sizes: Sequence[int],
    ) -> None:
        self.root = Path(root)
        self.folder = self.root / fingerprint(facts)[:32]
        self.depth = len(codebook_sizes)
        self.damaged: dict[str, str] = {}
        self._facts = dict(facts)
        self._form = RowForm(
            num_patches=num_patches,
            depth=self.depth,
            dtype=np.dtype("<u2" if max(codebook_sizes) <= 2**16 else "<u4"),
        )
        self._limits_D = np.asarray(codebook_sizes)
        self._bad: set[tuple[str, int, int]] = set()  # states of damaged files
        self._written = False  # parts that the index does not have yet
        self._names: list[str] = []
        self._parts: dict[int, Part] = {}
        self._index = _no_index()
        self._check_manifest()
        self.refresh()

    def __len__(self) -> int:
        """Images with codes, as of the last ``refresh``."""
        return len(self._index.keys)

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return self._form.num_patches

    @property
    def dtype(self) -> np.dtype:
        """Type of a code on disk."""
        return self._form.dtype

    def refresh(self) -> None:
        """See the parts that other processes have written since."""
        self._written = False
        names = self._list()
        if names == self._names:
            return
        index = _read_index(self.folder / INDEX.format(fingerprint({"parts": names})[:32]))
        if index is None:
            names, index = self._make_index(names)
        self._names, self._parts, self._index = names, {}, index

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without codes, each once, in order.

        Ranks that divide the answer among themselves have to ask before any of them writes.
        """
        self.refresh()
        wanted = list(dict.fromkeys(keys))
        there = self._index.find([*map(stored_key, wanted)]) >= 0
        return [key for key, found in zip(wanted, there, strict=True) if not found]

    def get(self, key: str) -> np.ndarray:
        """Codes [N, D] of one view of an image.

        Raises:
            DataError: the cache does not have them, or their part file was damaged.
        """
        if self._written:
            self.refresh()
        stored = stored_key(key)
        (place,) = self._index.find([stored])
        if place < 0:
            raise DataError(
                f"the code cache {self.folder} has no codes for the image with key {key}; run "
                "`asvr tokenizer encode` with the same configuration, or set data.codes=online"
                + self.differences()
            )
        part, row = self._place(place, stored)
        try:
            return part.row(row)
        except DamagedPartError as error:
            raise self._damage(part.name, error) from error

    def write(self, keys: Sequence[str], codes_IND: np.ndarray) -> None:
        """Add the codes of some images as one part file.

        Args:
            keys: of the images.
            codes_IND: their codes [I, N, D], any integer type.

        Raises:
            DataError: the shape does not fit, or a code lies outside its codebook.
        """
        wanted = (len(keys), self.num_patches, self.depth)
        if codes_IND.shape != wanted:
            raise DataError(f"codes have shape {codes_IND.shape}; this cache holds {wanted}")
        if len(keys) == 0:
            return
        if codes_IND.min() < 0 or (codes_IND >= self._limits_D).any():
            raise DataError(
                f"codes lie outside their codebooks of {self._limits_D.tolist()} entries: "
                f"{codes_IND.min()} to {codes_IND.max(axis=(0, 1)).tolist()}"
            )
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            write_atomically(manifest, json.dumps(self._facts, indent=2).encode() + b"\n")
        write_part(self.folder, [*map(stored_key, keys)], codes_IND, self._form)
        self._written = True

    def check(self, rank: int = 0, world: int = 1) -> dict[str, str]:
        """Parts that are damaged, and why, after reading a share of the files completely.

        They are set aside, so that their images are missing.

        Args:
            rank: this rank's number.
            world: ranks that share the work.
        """
        found: dict[str, str] = {}
        for path in sorted(self.folder.glob(f"*{SUFFIX}"))[rank::world]:
            try:
                Part(path, self._form).check()
            except (OSError, DamagedPartError) as error:
                self._set_aside(path.name, error)
                found[path.name] = str(error)
        return found

    def write_index(self) -> None:
        """Write the index of all parts, and delete those of fewer; one process does it."""
        self.refresh()
        path = self.folder / INDEX.format(fingerprint({"parts": self._names})[:32])
        if self._names and not path.exists():
            self._index.write(path)
        for old in self.folder.glob(INDEX.format("*")):
            if old != path:
                old.unlink(missing_ok=True)

    def differences(self) -> str:
        """What other caches below the root were made with otherwise; empty without any."""
        lines = []
        for manifest in sorted(self.root.glob(f"*/{MANIFEST}")):
            if manifest.parent != self.folder:
                facts = _read_manifest(manifest)
                lines.append(f"{manifest.parent} was made with {_compare(facts, self._facts)}")
        more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        return "".join(f"\n  {line}" for line in lines[:SHOWN]) + more

    def _check_manifest(self) -> None:
        manifest = self.folder / MANIFEST
        if manifest.exists() and (facts := _read_manifest(manifest)) != self._facts:
            raise DataError(
                f"the code cache {self.folder} is not what its name says: it was made with "
                f"{_compare(facts, self._facts)}; delete it or give another data.cache_dir"
            )

    def _list(self) -> list[str]:
        """Names of the part files that may be used."""
        names = []
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            try:
                status = path.stat()
            except OSError:
                continue
            if (path.name, status.st_ino, status.st_mtime_ns) in self._bad:
                continue
            if status.st_size != self._form.file_bytes(path.name):
                self._set_aside(path.name, DamagedPartError(f"{status.st_size} bytes are left"))
                continue
            names.append(path.name)
        return names

    def _make_index(self, names: Sequence[str]) -> tuple[list[str], "_Index"]:
        """The names of the good ones among some parts, and their index."""
        good, keys = [], []
        for name in names:
            try:
                keys.append(Part(self.folder / name, self._form).keys)
            except (OSError, DamagedPartError) as error:
                self._set_aside(name, error)
                continue
            good.append(name)
        return good, _index_of(keys)

    def _place(self, place: int, key: str) -> tuple[Part, int]:
        """The part that holds a key, and the row in it."""
        number, row = int(self._index.parts[place]), int(self._index.rows[place])
        if number < len(self._names) and number not in self._parts:
            name = self._names[number]
            try:
                self._parts[number] = Part(self.folder / name, self._form)
            except (OSError, DamagedPartError) as error:
                raise self._damage(name, error) from error
        part = self._parts.get(number)
        if part is None or row >= len(part.keys) or part.keys[row].tobytes() != bytes.fromhex(key):
            for file in self.folder.glob(INDEX.format("*")):
                file.unlink(missing_ok=True)
            raise DataError(f"the index of {self.folder} was damaged and is deleted; start again")
        return part, row

    def _damage(self, name: str, error: Exception) -> DataError:
        """The error of a part that turns out to be damaged, which is set aside."""
        self._set_aside(name, error)
        return DataError(
            f"the code cache {self.folder} was damaged: {name}: {error}; the file was set aside, "
            "and the next start or `asvr tokenizer encode` encodes its images again"
        )

    def _set_aside(self, name: str, why: Exception) -> None:
        """Keep a damaged part from being used, by other processes too where that is possible."""
        self.damaged[name] = str(why)
        path = self.folder / name
        with contextlib.suppress(OSError):  # it is gone, or the folder is read-only
            status = path.stat()
            self._bad.add((name, status.st_ino, status.st_mtime_ns))
            path.replace(path.with_name(name + ASIDE))


class _Index:
    """Sorted keys (bytes of 32, each once) with the number of their part and their row in it."""

    def __init__(self, keys: np.ndarray, parts: np.ndarray, rows: np.ndarray) -> None:
        self.keys, self.parts, self.rows = keys, parts, rows

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Place of every key in the index, -1 where there is none: int64 [I]."""
        if not len(keys):
            return np.empty(0, np.int64)
        wanted = np.frombuffer(b"".join(map(bytes.fromhex, keys)), dtype=_KEY)
        places = np.searchsorted(self.keys, wanted)
        there = places < len(self.keys)
        there[there] = self.keys[places[there]] == wanted[there]
        return np.where(there, places, -1)

    def write(self, path: Path) -> None:
        """Write it as an Arrow file."""
        keys = pa.py_buffer(np.ascontiguousarray(self.keys))
        column = pa.Array.from_buffers(pa.binary(KEY_BYTES), len(self.keys), [None, keys])
        columns = {"key": column, "part": pa.array(self.parts), "row": pa.array(self.rows)}
        write_table(path.parent, pa.table(columns), path.stem)


_KEY = np.dtype(f"S{KEY_BYTES}")


def _no_index() -> _Index:
    return _Index(np.empty(0, _KEY), np.empty(0, np.uint32), np.empty(0, np.uint32))


def _index_of(parts: Sequence[np.ndarray]) -> _Index:
    """The index of parts with these keys, uint8 [I, 32] each."""
    if not parts:
        return _no_index()
    keys = np.concatenate(parts).view(_KEY).reshape(-1)
    numbers = np.repeat(np.arange(len(parts), dtype=np.uint32), [len(part) for part in parts])
    rows = np.concatenate([np.arange(len(part), dtype=np.uint32) for part in parts])
    order = np.argsort(keys, kind="stable")
    first = np.append(True, keys[order][1:] != keys[order][:-1])
    chosen = order[first]
    return _Index(keys[chosen], numbers[chosen], rows[chosen])


def _read_index(path: Path) -> _Index | None:
    """An index file mapped into memory, or None when it is absent or damaged."""
    table = read_table(path)
    if table is None or table.num_rows == 0:
        return None
    (keys,), (parts,), (rows,) = (
        table.combine_chunks().column(name).chunks for name in ("key", "part", "row")
    )
    found = np.frombuffer(keys.buffers()[1], dtype=_KEY, count=len(keys))
    return _Index(found, parts.to_numpy(), rows.to_numpy())


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return facts if isinstance(facts, dict) else {}
    except (OSError, ValueError):
        return {}


def _compare(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The facts that differ, in words."""
    names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    return "; ".join(
        f"{name} {_short(theirs.get(name))} instead of {_short(ours.get(name))}" for name in names
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:20] + ".."
