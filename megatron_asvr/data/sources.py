"""The records of a split together with the state of their images."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed

from megatron_asvr.config.schema import Config, SourceConfig
from megatron_asvr.data.cache import cache_root
from megatron_asvr.data.images import MISSING, ImageIndex
from megatron_asvr.data.records import Record, raise_problems, read_records

LISTED = 20  # bad images named in a report


class Sources:
    """Records and their images.

    Args:
        config: the run's configuration.
        sources: JSON files with their image folders.
        device: where images are test-decoded.

    Attributes:
        records: all records, in order; bad ones included, so that indices do not depend on them.
        paths: a file for every content key, after :meth:`prepare`.

    Raises:
        DataError: a file or record has the wrong form.
    """

    def __init__(
        self, config: Config, sources: Sequence[SourceConfig], *, device: torch.device
    ) -> None:
        self._policy = config.data.on_bad_sample
        self._index = ImageIndex(config, folder=cache_root(config), device=device)
        self.records: list[Record] = read_records(sources)
        self.paths: dict[str, str] = {}
        self._bad: dict[str, str] = {}
        self._bad_records: frozenset[int] = frozenset()

    def prepare(self, *, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Check every image; ``group`` shares the work.

        Raises:
            DataError: images are bad and the policy is ``error``, or no record is good.
        """
        wanted = list(dict.fromkeys(path for record in self.records for path in record.images))
        self._index.prepare(wanted, group=group)
        self._bad = self._index.problems(wanted)
        self._bad_records = frozenset(
            number
            for number, record in enumerate(self.records)
            if any(path in self._bad for path in record.images)
        )
        self.paths = {self.key(path): path for path in wanted if path not in self._bad}
        all_bad = bool(self.records) and len(self._bad_records) == len(self.records)
        if self._bad and (self._policy == "error" or all_bad):
            self._refuse(all_bad)

    def is_good(self, number: int) -> bool:
        """Whether all images of a record can be used."""
        return number not in self._bad_records

    def key(self, path: str) -> str:
        """Content key of a good image."""
        return self._index.entries[path].key

    def good_image_keys(self) -> list[str]:
        """Keys of the good images, each once, in order of first use."""
        return list(self.paths)

    def report(self) -> dict[str, Any]:
        """Numbers of records and images, and the bad ones with their reasons."""
        return {
            "records": len(self.records),
            "images": len(self.paths) + len(self._bad),
            "bad_records": len(self._bad_records),
            "num_bad_images": len(self._bad),
            "bad_images": dict(list(self._bad.items())[:LISTED]),
        }

    def _refuse(self, all_bad: bool) -> None:
        owner: dict[str, str] = {}
        for record in self.records:
            for path in record.images:
                owner.setdefault(path, record.id)
        named = [f"{path} (record {owner[path]}): {why}" for path, why in self._bad.items()]
        hint = "repair them, or set data.on_bad_sample=replace"
        if all(why == MISSING for why in self._bad.values()):
            hint = "is data.*.images the right folder?"
        if all_bad:
            hint = f"no record is left; {hint}"
        raise_problems(named, f"images cannot be used ({hint})")
