"""Every image checked once, before training.

``ImageIndex`` reads, hashes and test-decodes each image; ranks or processes share the work, and
what they find is kept on disk by location, size and time of the file. So every rank knows the same
bad images without talking during training, and the next start reads none again. An image that fails
after that is an error, never a reason to replace a sample on one rank only.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import pyarrow as pa
import torch
from torch.distributed import ProcessGroup

from megatron_asvr.config.schema import Config
from megatron_asvr.data import locations
from megatron_asvr.data.decode import Decoder
from megatron_asvr.data.files import fingerprint, read_table, write_table
from megatron_asvr.data.gate import look
from megatron_asvr.data.views import Size
from megatron_asvr.errors import DataError
from megatron_asvr.log import Progress
from megatron_asvr.parallel.collectives import gather_objects

MISSING = "missing file"
DEADLY = "ends the process that decodes it"
CHECK_BATCH_BYTES = 64 * 2**20  # encoded bytes that wait to be test-decoded together
CHECK_BATCH = 64  # images that do
PART_IMAGES = 4096  # images of one part file: what an interruption can cost

# What is kept of every image, in the order of Entry's fields.
STATE = {
    "key": pa.binary(32),
    "problem": pa.string(),
    "kind": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
}

Run = Callable[..., Iterable]  # like map: applies a function to items, perhaps elsewhere


@dataclass(frozen=True, slots=True)
class Entry:
    """One image.

    Attributes:
        size_bytes: of the file it is in.
        mtime_ns: of that file.
        key: hash of its own bytes.
        problem: why it is bad, or None.
        kind: as in ``gate.kind_of``; empty where no header can be read.
        width: pixels, upright.
        height: pixels, upright.
    """

    size_bytes: int
    mtime_ns: int
    key: str
    problem: str | None
    kind: str = ""
    width: int = 0
    height: int = 0

    @property
    def shape(self) -> Size:
        """Height and width; 1 x 1 where no header can be read."""
        return max(1, self.height), max(1, self.width)


class ImageIndex:
    """Content hash and state of images, known for a location after :meth:`prepare`.

    Args:
        config: image settings.
        folder: where the index is kept.
        device: where images are test-decoded.

    Attributes:
        entries: what is known, by location.
    """

    def __init__(self, config: Config, *, folder: Path, device: torch.device) -> None:
        self._config = config
        self._device = device
        self.folder = folder / f"images-{image_rules(config)[:16]}"
        self.entries: dict[str, Entry] = {}

    def prepare(
        self, paths: Iterable[str], *, group: ProcessGroup | None = None, run: Run | None = None
    ) -> None:
        """Check every image that the index on disk does not know in its present state.

        Args:
            paths: locations of images, the same on every rank.
            group: ranks that share the work; all of them must call. None: this process alone.
            run: a ``map`` that shares the work among processes instead; it gives None for a batch
                that its process died of.
        """
        rank, world = (group.rank(), group.size()) if group is not None else (0, 1)
        mine = list(dict.fromkeys(paths))[rank::world]
        known = self._load()
        state = lru_cache(maxsize=None)(_state)  # one look at a file that holds many images
        found: dict[str, Entry] = {}
        for path in mine:
            now = state(locations.container(path))
            entry = known.get((locations.absolute(path), *now)) if now else None
            if entry is not None:
                found[path] = entry
        new = [path for path in mine if path not in found]
        batches = [new[start : start + CHECK_BATCH] for start in range(0, len(new), CHECK_BATCH)]
        if run is None:
            results = map(ImageChecker(self._config, self._device).check, batches)
        else:
            results = self._elsewhere(batches, run)
        unsaved: dict[str, Entry] = {}
        progress = Progress(
            "images checked", len(new), unit="images" + " of this rank" * (world > 1)
        )
        for entries in results:
            progress.add(len(entries))
            found.update(entries)
            unsaved.update({path: entry for path, entry in entries.items() if entry.key})
            if len(unsaved) >= PART_IMAGES:
                self._save(unsaved)
                unsaved = {}
        self._save(unsaved)
        for share in gather_objects(found, group=group):
            self.entries.update(share)

    def _elsewhere(self, batches: Sequence[Sequence[str]], run: Run) -> Iterator[dict[str, Entry]]:
        """What other processes find about each batch; images that they die of are bad."""
        check = partial(_check_elsewhere, self._config, self._device)
        for batch, entries in zip(batches, run(check, batches), strict=True):
            if entries is not None:
                yield entries
                continue
            alone = run(check, [[path] for path in batch])
            for path, found in zip(batch, alone, strict=True):
                yield {path: _deadly(path)} if found is None else found

    def problems(self, paths: Iterable[str]) -> dict[str, str]:
        """Why each bad path among ``paths`` is bad."""
        reasons = ((path, self.entries[path].problem) for path in paths)
        return {path: why for path, why in reasons if why is not None}

    def _load(self) -> dict[tuple[str, int, int], Entry]:
        """What earlier calls found; a part that cannot be read is left out, and checked again."""
        known = {}
        for part in sorted(self.folder.glob("*.arrow")):
            table = read_table(part)
            columns = table.to_pydict() if table is not None else {}
            if set(columns) >= {"path", "size", "changed", *STATE}:
                states = state_entries(columns, columns["size"], columns["changed"])
                for path, entry in zip(columns["path"], states, strict=True):
                    known[path, entry.size_bytes, entry.mtime_ns] = entry
        return known

    def _save(self, entries: dict[str, Entry]) -> None:
        if not entries:
            return
        values = list(entries.values())
        table = pa.table(
            {
                "path": pa.array([locations.absolute(path) for path in entries], pa.string()),
                "size": pa.array([entry.size_bytes for entry in values], pa.int64()),
                "changed": pa.array([entry.mtime_ns for entry in values], pa.int64()),
                **state_columns(values),
            }
        )
        write_table(self.folder, table)


def state_columns(entries: Sequence[Entry]) -> dict[str, pa.Array]:
    """Columns of a table with everything about images but the files they are in."""
    keys = [bytes.fromhex(entry.key) if entry.key else None for entry in entries]
    return {
        "key": pa.array(keys, pa.binary(32)),
        **{
            name: pa.array([getattr(entry, name) for entry in entries], kind)
            for name, kind in STATE.items()
            if name != "key"
        },
    }


def state_entries(
    columns: Mapping[str, Sequence], sizes: Iterable[int], times: Iterable[int]
) -> Iterator[Entry]:
    """The entries of such columns.

    Args:
        columns: as plain values.
        sizes: bytes of the files they are in.
        times: times of those files.
    """
    values = zip(*(columns[name] for name in STATE), strict=True)
    for size, changed, (key, *rest) in zip(sizes, times, values, strict=False):
        yield Entry(size, changed, key.hex() if key is not None else "", *rest)


class ImageChecker:
    """Reads, hashes and test-decodes images.

    Args:
        config: image settings.
        device: where images are decoded.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._decoder = Decoder(config, device, whole_only=True)

    def check(self, paths: Sequence[str]) -> dict[str, Entry]:
        """What is found about each of some images."""
        found: dict[str, Entry] = {}
        waiting: list[tuple[str, bytes]] = []
        waiting_bytes = 0
        state = lru_cache(maxsize=None)(locations.state)  # of a file that holds many images
        for path in paths:
            found[path], encoded = self._look(path, state)
            if encoded is not None:
                waiting.append((path, encoded))
                waiting_bytes += len(encoded)
            if len(waiting) == CHECK_BATCH or waiting_bytes > CHECK_BATCH_BYTES:
                self._decode(waiting, found)
                waiting, waiting_bytes = [], 0
        self._decode(waiting, found)
        return found

    def _look(
        self, path: str, state: Callable[[str], locations.State]
    ) -> tuple[Entry, bytes | None]:
        """The image's entry, and its bytes where decoding still has to be tried."""
        try:
            size, changed = state(locations.container(path))
            encoded = locations.read(path)
        except FileNotFoundError:
            return Entry(0, 0, "", MISSING), None
        except OSError as error:
            return Entry(0, 0, "", f"cannot be read: {error.strerror or error}"), None
        except DataError as error:
            return Entry(0, 0, "", str(error)), None
        data = self._config.data
        seen = look(encoded, max_pixels=data.max_image_pixels, fit=data.image_fit)
        key = hashlib.sha256(encoded).hexdigest()
        entry = Entry(size, changed, key, seen.problem, seen.kind, seen.width, seen.height)
        return entry, encoded if seen.problem is None else None

    def _decode(self, waiting: list[tuple[str, bytes]], found: dict[str, Entry]) -> None:
        bad = self._decoder.find_bad([encoded for _, encoded in waiting])
        for number, problem in bad.items():
            path = waiting[number][0]
            found[path] = replace(found[path], problem=problem)


def image_rules(config: Config) -> str:
    """Hash of the settings that decide which images are bad."""
    data = config.data
    return fingerprint(
        {
            "version": 3,
            "max_pixels": data.max_image_pixels,
            "fit": data.image_fit,
            "pil_kinds": sorted(data.pil_kinds),
        }
    )


_checker_of_this_process = lru_cache(maxsize=1)(ImageChecker)


def _check_elsewhere(config: Config, device: torch.device, paths: Sequence[str]) -> dict:
    return _checker_of_this_process(config, device).check(paths)


def _deadly(path: str) -> Entry:
    """The entry of an image that ends the process that decodes it."""
    key = hashlib.sha256(locations.read(path)).hexdigest()
    return Entry(*locations.state(locations.container(path)), key, DEADLY)


def _state(file: str) -> locations.State | None:
    try:
        return locations.state(file)
    except (OSError, DataError):
        return None
