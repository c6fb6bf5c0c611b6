"""The records of a split together with the state of their images.

Both come from the index (`asvr data index`) where there is one; then nothing is read at the start.
Otherwise the records are read and every image is checked.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed

from megatron_asvr.config.schema import Config, SourceConfig
from megatron_asvr.data.cache import cache_root
from megatron_asvr.data.decode import takes_pil
from megatron_asvr.data.images import MISSING, Entry, ImageIndex
from megatron_asvr.data.index import OVERLONG, Lengths, open_index, text_rules
from megatron_asvr.data.records import Record, raise_problems, read_sources
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.data.views import Size
from megatron_asvr.errors import DataError

logger = logging.getLogger(__name__)

LISTED = 20  # bad images named in a report


class Sources:
    """Records and their images.

    Args:
        config: the run's configuration.
        sources: where the samples are.
        device: where images are test-decoded.
        tokenizer: of the text, where lengths are asked for.

    Attributes:
        records: all records, in order, bad ones included; with ``data.on_bad_sample=drop`` without
            them.
        images: locations of the images of every record.
        sizes: number of records of every source.
        paths: a location for every content key, after :meth:`prepare`.
        bad_samples: source, id, image and reason of every bad image of a record, after it.

    Raises:
        DataError: a file or record has the wrong form, or ``drop`` is asked for without an index.
    """

    def __init__(
        self,
        config: Config,
        sources: Sequence[SourceConfig],
        *,
        device: torch.device,
        tokenizer: TextTokenizer | None = None,
    ) -> None:
        self._config = config
        self._names = [source.name or source.path for source in sources]
        self._device = device
        self._tokenizer = tokenizer
        self._index = open_index(config, sources, tokenizer)
        self._entries: dict[str, Entry] = {}
        self.records: Sequence[Record]
        self.images: Sequence[Sequence[str]]
        if self._index is not None:
            self.records, self.images = self._index.records, self._index.images
            self.sizes = self._index.sizes
        else:
            parts = read_sources(sources)
            self.records = [record for part in parts for record in part]
            self.images = [record.images for record in self.records]
            self.sizes = [len(part) for part in parts]
        self.paths: dict[str, str] = {}
        self.bad_samples: list[dict[str, str | None]] = []
        self._bad: dict[str, str] = {}
        self._bad_records: frozenset[int] = frozenset()
        self._num_bad_records = 0
        self._kept: np.ndarray | None = None
        if config.data.on_bad_sample == "drop":
            self._drop()

    def prepare(self, *, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Know every image's state, from the index or by checking it; ``group`` shares the work.

        Raises:
            DataError: images are bad and the policy is ``fail``, more than ``data.max_bad_share``
                of the records are bad, or no record of a source is good.
        """
        if self._kept is None and self._index is not None:
            self._judge(self._index.entries())
        elif self._kept is None:
            checked = ImageIndex(self._config, folder=cache_root(self._config), device=self._device)
            checked.prepare(_each(self.images), group=group)
            self._judge(checked.entries)
        good = (path for path in _each(self.images) if path not in self._bad)
        self.paths = {self.key(path): path for path in good}

    def _judge(self, entries: dict[str, Entry]) -> None:
        """Find the bad records; raise where the settings do not allow them."""
        self._entries = entries
        reasons = ((path, entries[path].problem) for path in _each(self.images))
        self._bad = {path: why for path, why in reasons if why is not None}
        self._bad_records = frozenset(
            number
            for number, images in enumerate(self.images)
            if any(path in self._bad for path in images)
        )
        self._num_bad_records = len(self._bad_records)
        self._name(sorted(self._bad_records))
        self._check_share()

    def _name(self, numbers: Iterable[int]) -> None:
        """Add bad records to ``bad_samples``, an image a line; without a bad one it is too long."""
        ends = np.cumsum(self.sizes)
        for number in numbers:
            source = self._names[int(np.searchsorted(ends, number, side="right"))]
            bad = [(path, self._bad[path]) for path in self.images[number] if path in self._bad]
            for image, why in bad or [(None, OVERLONG)]:
                record = {"source": source, "id": self.records[number].id}
                self.bad_samples.append({**record, "image": image, "reason": why})

    def _drop(self) -> None:
        """Leave out the bad records, so that the order is over good ones."""
        if self._index is None:
            raise DataError(
                "data.on_bad_sample=drop leaves out what `asvr data index` has found, and there is "
                f"no index of {', '.join(self._names)}; run it with this configuration, or set "
                "data.on_bad_sample=replace"
            )
        self._judge(self._index.entries())
        hopeless = self.overlong()
        self._name(sorted(hopeless))
        dropped = self._bad_records | hopeless
        kept = np.array([n for n in range(len(self.records)) if n not in dropped], dtype=np.int64)
        ends = np.cumsum(self.sizes)
        self.sizes = np.diff(np.searchsorted(kept, ends), prepend=0).tolist()
        self.records = Chosen(self.records, kept)
        self.images = [self.images[number] for number in kept]
        self._bad_records, self._kept = frozenset(), kept

    def overlong(self) -> frozenset[int]:
        """Good records that the index knows not to fit, however questions are laid out."""
        found = [self.lengths(branches=branches) for branches in (True, False)]
        if found[0] is None or found[1] is None:
            return frozenset()
        empty = set(found[0].empty()) & set(found[1].empty())
        return frozenset(empty - self._bad_records)

    def lengths(self, *, branches: bool) -> Lengths | None:
        """Lengths of every sample's rows, or None when no index has them."""
        if self._index is None or self._tokenizer is None:
            return None
        rules = text_rules(self._config, self._tokenizer)
        found = self._index.lengths(rules, branches=branches)
        if found is None:
            logger.warning(
                "the index %s was made for another tokenizer, template or length: samples are "
                "measured when they are met; run `asvr data index` again",
                self._index.folder,
            )
        if found is not None and self._kept is not None:
            return found.chosen(self._kept)
        return found

    def num_conversations(self) -> np.ndarray:
        """Conversations of every record."""
        if self._index is not None:
            found = self._index.records.num_conversations()
            return found if self._kept is None else found[self._kept]
        return np.array([len(record.conversations) for record in self.records])

    def is_good(self, number: int) -> bool:
        """Whether all images of a record can be used."""
        return number not in self._bad_records

    def key(self, path: str) -> str:
        """Content key of a good image."""
        return self._entries[path].key

    def sizes_of(self, number: int) -> tuple[Size, ...]:
        """Height and width of each image of a record."""
        return tuple(self._entries[path].shape for path in self.images[number])

    def size_of(self, key: str) -> Size:
        """Height and width of the good image with this content key."""
        return self._entries[self.paths[key]].shape

    def good_image_keys(self) -> list[str]:
        """Keys of the good images, each once, in order of first use."""
        return list(self.paths)

    def kinds(self) -> dict[str, list[str]]:
        """Locations of the good images of every kind (``gate.kind_of``), each content once."""
        found: dict[str, list[str]] = {}
        for path in self.paths.values():
            found.setdefault(self._entries[path].kind, []).append(path)
        return found

    def report(self) -> dict[str, Any]:
        """Numbers of records and images, those that PIL decodes by kind, and the bad ones."""
        kinds = {kind: len(paths) for kind, paths in sorted(self.kinds().items())}
        return {
            "records": len(self.records),
            "images": len(self.paths) + len(self._bad),
            "bad_records": self._num_bad_records,
            "num_bad_images": len(self._bad),
            "pil_images": {
                k: n for k, n in kinds.items() if takes_pil(k, self._config.data.pil_kinds)
            },
            "bad_images": dict(list(self._bad.items())[:LISTED]),
        }

    def _check_share(self) -> None:
        """Raise where there are more bad records than the settings allow."""
        if not self._bad:
            return
        data, bad = self._config.data, len(self._bad_records)
        ends = np.cumsum(self.sizes)
        numbers = np.array(sorted(self._bad_records))
        lost = np.diff(np.searchsorted(numbers, ends), prepend=0)
        missing = all(why == MISSING for why in self._bad.values())
        folder = "is data.*.images the right folder?"
        for name, size, gone in zip(self._names, self.sizes, lost, strict=True):
            if size and gone == size:
                raise_problems(
                    self._listed(), f"images cannot be used (no record of {name} is left; {folder})"
                )
        if data.on_bad_sample == "fail":
            hint = folder if missing else "repair them, or set data.on_bad_sample=replace"
            raise_problems(self._listed(), f"images cannot be used ({hint})")
        if bad > data.max_bad_share * len(self.records):
            share = (
                f"{bad} of {len(self.records)} records, more than "
                f"data.max_bad_share={data.max_bad_share}; "
            )
            hint = folder if missing else "repair them, or raise it if the rest will do"
            raise_problems(self._listed(), f"images cannot be used ({share}{hint})")

    def _listed(self) -> list[str]:
        owner: dict[str, int] = {}
        for number in sorted(self._bad_records):
            for path in self.images[number]:
                owner.setdefault(path, number)
        return [
            f"{path} (record {self.records[owner[path]].id}): {why}"
            for path, why in self._bad.items()
        ]


class Chosen(Sequence[Record]):
    """Some records of a sequence, in order.

    Args:
        records: all of them.
        numbers: which.
    """

    def __init__(self, records: Sequence[Record], numbers: np.ndarray) -> None:
        self._records, self._numbers = records, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: Any) -> Any:
        return self._records[int(self._numbers[number])]


def _each(images: Sequence[Sequence[str]]) -> list[str]:
    """Every location once."""
    return list(dict.fromkeys(path for paths in images for path in paths))
