"""Every image file checked once, before training.

``ImageIndex`` reads, hashes and test-decodes each file; ranks share the work and the result is
kept on disk by path, size and modification time. So every rank knows the same bad images without
talking during training, and the next start is instant. An image that fails after that is an error,
never a reason to replace a sample on one rank only.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed import ProcessGroup

from megatron_asvr.config.schema import Config
from megatron_asvr.data import locations
from megatron_asvr.data.files import fingerprint, write_atomically
from megatron_asvr.data.gate import refusal
from megatron_asvr.data.pixels import image_decoder
from megatron_asvr.errors import DataError
from megatron_asvr.parallel.collectives import gather_objects

if TYPE_CHECKING:
    from megatron_asvr.data.dali.pipeline import ImageDecoder

MISSING = "missing file"
CHECK_BATCH_BYTES = 64 * 2**20  # encoded bytes that wait to be test-decoded together
CHECK_BATCH = 64  # images that do


@dataclass(frozen=True, slots=True)
class Entry:
    """One image: size and time of the file it is in, hash of its own bytes, and why it is bad."""

    size_bytes: int
    mtime_ns: int
    key: str
    problem: str | None


class ImageIndex:
    """Content hash and state of image files, known for a path after :meth:`prepare`.

    Args:
        config: image settings.
        folder: where the index is kept.
        device: where images are test-decoded.

    Attributes:
        entries: what is known, by path.
    """

    def __init__(self, config: Config, *, folder: Path, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._max_pixels = config.data.max_image_pixels
        self._fit = config.data.image_fit
        rules = {"version": 1, "max_pixels": self._max_pixels, "fit": self._fit}
        self._file = folder / f"images-{fingerprint(rules)[:16]}.json"
        self._decoder: ImageDecoder | None = None
        self.entries: dict[str, Entry] = {}

    def prepare(self, paths: Iterable[str], *, group: ProcessGroup | None = None) -> None:
        """Check every path that the index on disk does not know in its present state.

        Args:
            paths: image files, the same on every rank.
            group: ranks that share the work; all of them must call. None: this process alone.
        """
        rank, world = (group.rank(), group.size()) if group is not None else (0, 1)
        wanted = sorted(set(paths))
        known = self._load()
        shares = gather_objects(self._check(wanted[rank::world], known), group=group)
        found = {path: entry for share in shares for path, entry in share.items()}
        self.entries.update(found)
        lasting = {locations.absolute(path): entry for path, entry in found.items() if entry.key}
        if rank == 0 and any(known.get(path) != entry for path, entry in lasting.items()):
            self._save(known | lasting)

    def problems(self, paths: Iterable[str]) -> dict[str, str]:
        """Why each bad path among ``paths`` is bad."""
        reasons = ((path, self.entries[path].problem) for path in paths)
        return {path: why for path, why in reasons if why is not None}

    def _check(self, paths: Sequence[str], known: dict[str, Entry]) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        waiting: list[tuple[str, bytes]] = []
        waiting_bytes = 0
        for path in paths:
            found[path], encoded = self._look(path, known.get(locations.absolute(path)))
            if encoded is not None:
                waiting.append((path, encoded))
                waiting_bytes += len(encoded)
            if len(waiting) == CHECK_BATCH or waiting_bytes > CHECK_BATCH_BYTES:
                self._decode(waiting, found)
                waiting, waiting_bytes = [], 0
        self._decode(waiting, found)
        self._decoder = None  # its buffers are not needed again
        return found

    def _look(self, path: str, known: Entry | None) -> tuple[Entry, bytes | None]:
        """The file's entry, and its bytes where decoding still has to be tried."""
        try:
            size, changed = locations.state(locations.container(path))
            if known and (known.size_bytes, known.mtime_ns) == (size, changed):
                return known, None
            encoded = locations.read(path)
        except FileNotFoundError:
            return Entry(0, 0, "", MISSING), None
        except OSError as error:
            return Entry(0, 0, "", f"cannot be read: {error.strerror or error}"), None
        except DataError as error:
            return Entry(0, 0, "", str(error)), None
        problem = refusal(encoded, max_pixels=self._max_pixels, fit=self._fit)
        key = hashlib.sha256(encoded).hexdigest()
        entry = Entry(size, changed, key, problem)
        return entry, encoded if problem is None else None

    def _decode(self, waiting: list[tuple[str, bytes]], found: dict[str, Entry]) -> None:
        if not waiting:
            return
        if self._decoder is None:
            self._decoder = image_decoder(self._config, self._device)
        bad = self._decoder.find_bad([encoded for _, encoded in waiting])
        for number, problem in bad.items():
            path = waiting[number][0]
            found[path] = replace(found[path], problem=problem)

    def _load(self) -> dict[str, Entry]:
        """What earlier runs found; nothing when the file is absent or unreadable."""
        try:
            stored = json.loads(self._file.read_bytes())
            return {path: Entry(*values) for path, values in stored.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _save(self, entries: dict[str, Entry]) -> None:
        # By hand: dataclasses.astuple copies deeply, which takes seconds for a large data set.
        rows = {p: (e.size_bytes, e.mtime_ns, e.key, e.problem) for p, e in entries.items()}
        text = json.dumps(rows)
        write_atomically(self._file, text.encode())
