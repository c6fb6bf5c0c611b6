"""What a loader counts: whatever samples lost, and how full its sequences are."""

from collections.abc import Sequence
from typing import Any

from megatron_asvr.batch import MicroBatch
from megatron_asvr.data.collate import Document
from megatron_asvr.data.sample import Sample

AMOUNTS = ("cut_tokens", "dropped_tokens", "lost_targets", "lost_first_patches", "repeated_images")


class Tally:
    """Counts of different samples, and sums over micro-batches.

    One thread counts; any may ask for the report meanwhile.
    """

    def __init__(self) -> None:
        self._events: dict[str, dict[int, int]] = {}
        self._sums = {"sequences": 0, "empty_micro_batches": 0, "positions": 0, "filled": 0}

    def count(self, name: str, number: int, amount: int = 1) -> None:
        """Count that something happened to the sample of this number; again is the same."""
        self._events.setdefault(name, {})[number] = amount

    def sample(self, number: int, sample: Sample, *, lost_first_patches: int) -> None:
        """Count what a sample lost.

        Args:
            number: of its record; ids may occur twice.
            sample: that was met.
            lost_first_patches: first patches of its images that have no target.
        """
        for name, amount in (
            ("cut_tokens", sample.cut_tokens),
            ("dropped_rows", sample.dropped_rows),
            ("dropped_tokens", sample.dropped_tokens),
            ("lost_targets", sample.lost_targets),
            ("lost_first_patches", lost_first_patches),
            ("repeated_images", len(sample.images) * max(0, len(sample.rows) - 1)),
        ):
            if amount:
                self.count(name, number, amount)

    def micro_batch(self, batch: MicroBatch, rows: Sequence[Sequence[Document]]) -> None:
        """Count a micro-batch that holds these documents."""
        for name, amount in (
            ("sequences", len(rows)),
            ("empty_micro_batches", int(not rows)),
            ("positions", batch.document_BS.numel()),
            ("filled", sum(document.row.length for row in rows for document in row)),
        ):
            self._sums[name] += amount

    def report(self) -> dict[str, Any]:
        """How many samples something happened to, totals of ``AMOUNTS``, sums and the fill."""
        # Copies, because another thread may be counting meanwhile.
        found = {name: dict(amounts) for name, amounts in sorted(dict(self._events).items())}
        events = {name: len(amounts) for name, amounts in found.items()}
        totals = {f"{name}_total": sum(found[name].values()) for name in AMOUNTS if name in found}
        sums = dict(self._sums)
        positions = sums.pop("positions")
        return {**events, **totals, **sums, "fill": sums.pop("filled") / max(1, positions)}
