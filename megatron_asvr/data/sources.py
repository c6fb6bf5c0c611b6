"""The records of a split together with the state of their images.

Both come from the index (`asvr data index`) where there is one; then nothing is read at the start.
Otherwise the records are read and every image is checked.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed

from megatron_asvr.config.schema import Config, SourceConfig
from megatron_asvr.data.cache import cache_root
from megatron_asvr.data.decode import takes_pil
from megatron_asvr.data.images import MISSING, Entry, ImageIndex
from megatron_asvr.data.index import Lengths, open_index, text_rules
from megatron_asvr.data.records import Record, raise_problems, read_sources
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.data.views import Size

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
        records: all records, in order; bad ones included, so that indices do not depend on them.
        images: locations of the images of every record.
        sizes: number of records of every source.
        paths: a location for every content key, after :meth:`prepare`.

    Raises:
        DataError: a file or record has the wrong form.
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
        self._pil_kinds = config.data.pil_kinds
        self._policy = config.data.on_bad_sample
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
        self._bad: dict[str, str] = {}
        self._bad_records: frozenset[int] = frozenset()

    def prepare(self, *, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Know every image's state, from the index or by checking it; ``group`` shares the work.

        Raises:
            DataError: images are bad and the policy is ``error``, or no record is good.
        """
        wanted = list(dict.fromkeys(path for images in self.images for path in images))
        if self._index is not None:
            self._entries = self._index.entries()
        else:
            folder = cache_root(self._config)
            checked = ImageIndex(self._config, folder=folder, device=self._device)
            checked.prepare(wanted, group=group)
            self._entries = checked.entries
        reasons = ((path, self._entries[path].problem) for path in wanted)
        self._bad = {path: why for path, why in reasons if why is not None}
        self._bad_records = frozenset(
            number
            for number, images in enumerate(self.images)
            if any(path in self._bad for path in images)
        )
        self.paths = {self.key(path): path for path in wanted if path not in self._bad}
        all_bad = bool(self.records) and len(self._bad_records) == len(self.records)
        if self._bad and (self._policy == "error" or all_bad):
            self._refuse(all_bad)

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
        return found

    def num_conversations(self) -> np.ndarray:
        """Conversations of every record."""
        if self._index is not None:
            return self._index.records.num_conversations()
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
            "bad_records": len(self._bad_records),
            "num_bad_images": len(self._bad),
            "pil_images": {k: n for k, n in kinds.items() if takes_pil(k, self._pil_kinds)},
            "bad_images": dict(list(self._bad.items())[:LISTED]),
        }

    def _refuse(self, all_bad: bool) -> None:
        owner: dict[str, int] = {}
        for number, images in enumerate(self.images):
            for path in images:
                owner.setdefault(path, number)
        named = [
            f"{path} (record {self.records[owner[path]].id}): {why}"
            for path, why in self._bad.items()
        ]
        hint = "repair them, or set data.on_bad_sample=replace"
        if all(why == MISSING for why in self._bad.values()):
            hint = "is data.*.images the right folder?"
        if all_bad:
            hint = f"no record is left; {hint}"
        raise_problems(named, f"images cannot be used ({hint})")
