"""What is computed of an image once, on disk: the tokenizer's codes, the encoder's features.

A cache folder is named by a fingerprint of everything that its values depend on, and holds the same
in words (``manifest.json``), so that a cache made otherwise is never used and the difference can be
told. Values are found by the key of an image (data/views.py: its bytes, and which view of it this
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
import torch
from torch import Tensor

from megatron_asvr.config.schema import Config
from megatron_asvr.data.files import fingerprint, write_atomically
from megatron_asvr.data.keys import KeyIndex, index_of, read_index
from megatron_asvr.data.parts import (
    FORMAT,
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


def cache_facts(config: Config, encoder: Mapping[str, Any], *, device: str) -> dict[str, Any]:
    """Everything that values depend on beside the image, by name; a cache is of one set of them.

    Args:
        config: the run.
        encoder: ``facts`` of what encodes (``VisualTokenizer``, ``ImageReader``).
        device: type of the device that decodes and encodes.
    """
    return {"format": FORMAT, **pixel_facts(config, device), **encoder}


def cache_root(config: Config) -> Path:
    """Folder of all caches: ``data.cache_dir``, or ``codes`` beside the run folder."""
    if config.data.cache_dir is not None:
        return Path(config.data.cache_dir)
    return Path(config.run.dir).parent / "codes"


class ImageCache:
    """Values [N, D] by image key.

    Args:
        root: folder of all caches of a kind.
        facts: everything that the values depend on beside the image, by name.
        form: of the values of one image.

    Attributes:
        damaged: part files that were found damaged, and why; their images are missing.

    Raises:
        DataError: the folder's manifest says that it is another cache.
    """

    def __init__(self, root: str | Path, facts: Mapping[str, Any], form: RowForm) -> None:
        self.root = Path(root)
        self.folder = self.root / fingerprint(facts)[:32]
        self.kind = form.kind
        self.damaged: dict[str, str] = {}
        self._facts = dict(facts)
        self._form = form
        self._bad: set[tuple[str, int, int]] = set()  # states of damaged files
        self._written = False  # parts that the index does not have yet
        self._names: list[str] = []
        self._parts: dict[int, Part] = {}
        self._index = index_of([])
        self._check_manifest()
        self.refresh()

    def __len__(self) -> int:
        """Images with values, as of the last ``refresh``."""
        return len(self._index.keys)

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return self._form.num_patches

    @property
    def depth(self) -> int:
        """Values of one patch."""
        return self._form.depth

    @property
    def dtype(self) -> np.dtype:
        """Type of a value on disk."""
        return self._form.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes on disk that one image takes."""
        return self._form.row_bytes

    def refresh(self) -> None:
        """See the parts that other processes have written since."""
        self._written = False
        names = self._list()
        if names == self._names:
            return
        index = read_index(self.folder / INDEX.format(fingerprint({"parts": names})[:32]))
        if index is None:
            names, index = self._make_index(names)
        self._names, self._parts, self._index = names, {}, index

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without values, each once, in order.

        Ranks that divide the answer among themselves have to ask before any of them writes.
        """
        self.refresh()
        wanted = list(dict.fromkeys(keys))
        there = self._index.find([*map(stored_key, wanted)]) >= 0
        return [key for key, found in zip(wanted, there, strict=True) if not found]

    def get(self, key: str) -> np.ndarray:
        """Values [N, D] of one view of an image.

        Raises:
            DataError: the cache does not have them, or their part file was damaged.
        """
        if self._written:
            self.refresh()
        stored = stored_key(key)
        (place,) = self._index.find([stored])
        if place < 0:
            raise DataError(
                f"the {self.kind} cache {self.folder} has no {self.kind}s for the image with key "
                f"{key}; run `asvr tokenizer encode` with the same configuration, or set "
                f"data.{self.kind}s=online" + self.differences()
            )
        part, row = self._place(place, stored)
        try:
            return part.row(row)
        except DamagedPartError as error:
            raise self._damage(part.name, error) from error

    def write(self, keys: Sequence[str], values_IND: np.ndarray) -> None:
        """Add the values of some images as one part file.

        Args:
            keys: of the images.
            values_IND: their values [I, N, D], of any type that the cache's can hold.

        Raises:
            DataError: the shape does not fit, or the values cannot be right.
        """
        wanted = (len(keys), self.num_patches, self.depth)
        if values_IND.shape != wanted:
            raise DataError(
                f"{self.kind}s have shape {values_IND.shape}; this cache holds {wanted}"
            )
        if len(keys) == 0:
            return
        self._check(values_IND)
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            write_atomically(manifest, json.dumps(self._facts, indent=2).encode() + b"\n")
        write_part(self.folder, [*map(stored_key, keys)], values_IND, self._form)
        self._written = True

    def add(self, keys: Sequence[str], values_IND: Tensor) -> None:
        """Add the values of some images, a tensor [I, N, D], as one part file; see ``write``."""
        self.write(keys, values_IND.cpu().numpy())

    def check(self, rank: int = 0, world: int = 1) -> dict[str, str]:
        """Parts that are damaged, and why, after reading a share of the files completely.

        They are set aside, so that their images are missing.

        Args:
            rank: this rank's number.
            world: ranks that share the work.
        """
        found: dict[str, str] = {}
        for path in sorted(self.folder.glob(f"*{self._form.suffix}"))[rank::world]:
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

    def _check(self, values_IND: np.ndarray) -> None:
        """Raise where values cannot be right."""

    def _check_manifest(self) -> None:
        manifest = self.folder / MANIFEST
        if manifest.exists() and (facts := _read_manifest(manifest)) != self._facts:
            raise DataError(
                f"the {self.kind} cache {self.folder} is not what its name says: it was made with "
                f"{_compare(facts, self._facts)}; delete it or give another data.cache_dir"
            )

    def _list(self) -> list[str]:
        """Names of the part files that may be used."""
        names = []
        for path in sorted(self.folder.glob(f"*{self._form.suffix}")):
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

    def _make_index(self, names: Sequence[str]) -> tuple[list[str], KeyIndex]:
        """The names of the good ones among some parts, and their index."""
        good, keys = [], []
        for name in names:
            try:
                keys.append(Part(self.folder / name, self._form).keys)
            except (OSError, DamagedPartError) as error:
                self._set_aside(name, error)
                continue
            good.append(name)
        return good, index_of(keys)

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
            f"the {self.kind} cache {self.folder} was damaged: {name}: {error}; the file was set "
            "aside, and the next start or `asvr tokenizer encode` encodes its images again"
        )

    def _set_aside(self, name: str, why: Exception) -> None:
        """Keep a damaged part from being used, by other processes too where that is possible."""
        self.damaged[name] = str(why)
        path = self.folder / name
        with contextlib.suppress(OSError):  # it is gone, or the folder is read-only
            status = path.stat()
            self._bad.add((name, status.st_ino, status.st_mtime_ns))
            path.replace(path.with_name(name + ASIDE))


class CodeCache(ImageCache):
    """The visual tokenizer's codes by image key.

    Args:
        root: folder of all code caches.
        facts: from :func:`cache_facts`.
        num_patches: patches of one image.
        codebook_sizes: of the tokenizer's depths; up to 65,536 each code takes two bytes.

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
        dtype = np.dtype("<u2" if max(codebook_sizes) <= 2**16 else "<u4")
        form = RowForm(num_patches=num_patches, depth=len(codebook_sizes), dtype=dtype)
        super().__init__(root, facts, form)
        self._limits_D = np.asarray(codebook_sizes)

    def _check(self, values_IND: np.ndarray) -> None:
        if values_IND.min() < 0 or (values_IND >= self._limits_D).any():
            raise DataError(
                f"codes lie outside their codebooks of {self._limits_D.tolist()} entries: "
                f"{values_IND.min()} to {values_IND.max(axis=(0, 1)).tolist()}"
            )


class FeatureCache(ImageCache):
    """A frozen encoder's features by image key, bit for bit.

    Args:
        root: folder of all caches.
        facts: of encoder and pixels.
        num_patches: patches of one image.
        width: of a feature.
        dtype: of the features.

    Raises:
        DataError: the folder's manifest says that it is another cache.
    """

    def __init__(
        self,
        root: str | Path,
        facts: Mapping[str, Any],
        *,
        num_patches: int,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        bits = np.dtype(f"<u{dtype.itemsize}")
        form = RowForm(num_patches=num_patches, depth=width, dtype=bits, kind="feature")
        super().__init__(Path(root) / "features", facts, form)
        self._bits, self._dtype = getattr(torch, bits.name), dtype

    def features(self, keys: Sequence[str]) -> Tensor:
        """Features [I, N, F] of some views of images.

        Raises:
            DataError: the cache does not have them, or their part file was damaged.
        """
        found = np.empty((len(keys), self.num_patches, self.depth), self.dtype)
        for place, key in enumerate(keys):
            found[place] = self.get(key)
        return torch.from_numpy(found).view(self._dtype)

    def add(self, keys: Sequence[str], values_IND: Tensor) -> None:
        """Add the features of some images, a tensor [I, N, F], as one part file."""
        super().add(keys, values_IND.contiguous().view(self._bits))


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
