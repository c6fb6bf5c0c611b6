"""The micro-batches of every step, for one rank.

A step is a pure function of (seed, step): the order names its records, bad ones are replaced by the
next good one in file order (a decision every rank can make alone, because all know the same bad
images after ``prepare``), and each data-parallel rank takes its contiguous part: of the samples,
or, with packing, of the sequences that every rank plans for the whole global batch. All ranks have
the same number of micro-batches; who runs out of data has empty ones. One worker thread reads,
decodes and collates ahead of the training step; it alone touches the images.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal

from megatron_asvr.platforms import select

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from megatron_asvr.batch import MicroBatch
from megatron_asvr.config.schema import Config
from megatron_asvr.data.cache import CodeCache
from megatron_asvr.data.collate import WHOLE, Collator, Document, View
from megatron_asvr.data.order import (
    Item,
    StepOrder,
    blend,
    micro_batches,
    num_micro_batches,
    rank_part,
)
from megatron_asvr.data.packing import pack
from megatron_asvr.data.pixels import BLANK_KEY, ZERO_KEY, PixelStore
from megatron_asvr.data.sample import Sample, SampleBuilder
from megatron_asvr.data.sources import Sources
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.errors import ConfigError, DataError

AMOUNTS = ("cut_tokens", "lost_targets", "lost_first_patches", "repeated_images")
SAMPLE_CACHE_POSITIONS = 2_000_000  # positions of tokenised samples kept in memory (28 bytes each)


class Loader:
    """Micro-batches of a split; call :meth:`prepare` before anything else.

    Args:
        config: the run's configuration.
        tokenizer: of the language model.
        split: ``train`` is shuffled and endless; ``eval`` meets every good sample once, in order.
        view: which part of every step this rank needs; default: everything.
        branches: whether attention keeps the conversations of one row apart; without it the
            images are repeated, one row a conversation.
        codes: cache of the visual tokenizer's codes; None when they are not needed or online.
        device: where images are decoded and pixels live; default: the platform's.

    Raises:
        ConfigError: ``loss.mode=official`` with records of several conversations, or the tokenizer
            has ids that the language model does not.
        DataError: a file of records is missing or wrong.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: TextTokenizer,
        *,
        split: Literal["train", "eval"],
        view: View = WHOLE,
        branches: bool = True,
        codes: CodeCache | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._config = config
        self._split = split
        self._view = view
        self._codes = codes
        device = device or select()[0].device
        self._sources = Sources(
            config, getattr(config.data, split), device=device, tokenizer=tokenizer
        )
        if split == "train" and config.loss.mode == "official":
            _check_official(self._sources)
        self._builder = SampleBuilder(config, tokenizer, branches=branches)
        self._lengths = self._sources.lengths(branches=branches)
        self._collator = Collator.from_config(
            config,
            tokenizer.pad_id,
            view=view,
            code_depth=codes.depth if codes is not None else 0,
        )
        self._store = PixelStore(config, device=device, verify=True)
        self._order = StepOrder(
            self._sources.sizes,
            config.train.global_batch,
            seed=config.run.seed,
            taken=blend(getattr(config.data, split), self._sources.sizes),
            shuffle=split == "train",
        )
        self._samples: OrderedDict[int, Sample] = OrderedDict()
        self._sample_positions = 0
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"asvr-{split}")
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}
        self._events: dict[str, dict[str, int]] = {}
        self._sums = {"sequences": 0, "empty_micro_batches": 0, "positions": 0, "filled": 0}

    def prepare(self, *, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Check every image once; afterwards all ranks know the same bad ones.

        Args:
            group: ranks that share the work; all of them have to call. None: this process alone.

        Raises:
            DataError: images are missing or bad and ``data.on_bad_sample`` is ``error``, or no
                good record is left.
        """
        self._sources.prepare(group=group)

    @property
    def num_samples(self) -> int:
        """Records of the split, bad ones included."""
        return len(self._sources.records)

    def blend(self) -> list[tuple[str, int, int]]:
        """Name of every source, samples that an epoch takes from it, and how many it has."""
        names = [source.name or source.path for source in getattr(self._config.data, self._split)]
        return list(zip(names, self._order.taken, self._order.sizes, strict=True))

    @property
    def steps(self) -> int:
        """Steps of one epoch: enough to meet every record."""
        return self._order.steps

    def step(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of one step; the next ones are prepared meanwhile.

        The list is as long on every rank, and a multiple of ``parallel.pp`` with ``parallel.vpp``.
        Micro-batches without documents fill it up; ``eval``, which leaves out what cannot be used,
        may have nothing else.

        Raises:
            DataError: naming the step, the rank and the samples.
        """
        future = self._request(step)
        last = step + self._config.data.prefetch_batches
        if self._split == "eval":
            last = min(last, self.steps - 1)
        for later in range(step + 1, last + 1):
            self._request(later)
        for other in [s for s in self._ahead if not step <= s <= last]:
            self._ahead.pop(other).cancel()
        del self._ahead[step]  # also when it failed, so that it can be asked for again
        return future.result()

    def sample_ids(self, step: int) -> list[str]:
        """Ids of the records that this rank builds for a step (with packing: of all of them)."""
        return [self._sources.records[index].id for index in self._indices(step)]

    def image_keys(self) -> list[str]:
        """Content keys of the split's good images, each once; the same list on every rank."""
        keys = self._sources.good_image_keys()
        if self._config.data.blank_images and keys:
            keys = [BLANK_KEY]
        return [*keys, ZERO_KEY] if self._collator.official else keys

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """float32 pixels [I, C, H, W] of some of :meth:`image_keys`."""
        keys = self.image_keys()
        return self.pixels_of([keys[index] for index in indices])

    def pixels_of(self, keys: Sequence[str]) -> Tensor:
        """float32 pixels [I, C, H, W] of the images with these keys."""
        return self._worker.submit(self._pixels, keys).result()

    def report(self) -> dict[str, Any]:
        """What was bad, replaced, cut, dropped or repeated, as plain values.

        Counts of samples are of different samples that this rank has met so far; ``bad_images``
        and ``bad_records`` are of the whole split. ``sequences``, ``fill`` (the share of positions
        that are no padding) and ``empty_micro_batches`` are of all steps that were prepared.
        """
        # Copies, because the worker may be counting meanwhile.
        found = {name: dict(amounts) for name, amounts in sorted(dict(self._events).items())}
        events = {name: len(amounts) for name, amounts in found.items()}
        totals = {f"{name}_total": sum(found[name].values()) for name in AMOUNTS if name in found}
        damaged = len(self._codes.damaged) if self._codes is not None else 0
        sums = dict(self._sums)
        positions = sums.pop("positions")
        fill = {"fill": sums.pop("filled") / max(1, positions)}
        whole = {**self._sources.report(), "damaged_code_parts": damaged}
        return {**whole, **events, **totals, **sums, **fill}

    def close(self) -> None:
        """Stop the worker; what it has begun is finished, the rest is forgotten."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _request(self, step: int) -> "Future[list[MicroBatch]]":
        if step not in self._ahead:
            self._ahead[step] = self._worker.submit(self._compute, step)
        return self._ahead[step]

    def _compute(self, step: int) -> list[MicroBatch]:
        try:
            batches = self._rows(step)
            # Pipeline stages exchange tensors of one shape a step.
            size = self._collator.size(batches) if self._config.parallel.pp > 1 else None
            return [self._collate(rows, size) for rows in batches]
        except Exception as error:
            raise DataError(
                f"step {step}, data-parallel rank {self._view.dp_rank}, samples "
                f"{', '.join(self.sample_ids(step))}: {error}"
            ) from error

    def _indices(self, step: int) -> list[int]:
        """Records whose samples this rank has to know."""
        indices = self._order.indices(step)
        if self._config.data.packing:
            return indices
        return rank_part(indices, self._view.dp_rank, self._view.dp)

    def _rows(self, step: int) -> list[list[list[Document]]]:
        """The documents of every row of this rank's micro-batches."""
        found = [self._usable(index) for index in self._indices(step)]
        numbers = [number for number in found if number is not None]
        if not self._config.data.packing:
            samples = [self._documents(number) for number in numbers]
            groups = self._groups(samples, len(self._order.indices(step)))
            return [[[d] for documents in group for d in documents] for group in groups]
        # Packing looks at lengths; only this rank's samples are built, where an index has those.
        rows = [(n, r, length) for n in numbers for r, length in enumerate(self._row_lengths(n))]
        lengths = [self._collator.padded_length(length) for *_, length in rows]
        limit = self._config.data.pack_length or self._config.data.max_length
        packs = pack(lengths, self._collator.padded_length(limit), self._config.run.seed)
        mine = rank_part(packs, self._view.dp_rank, self._view.dp)
        chosen = [[self._documents(rows[i][0])[rows[i][1]] for i in indices] for indices in mine]
        return self._groups(chosen, len(packs))

    def _groups(self, items: list[Item], total: int) -> list[list[Item]]:
        """This rank's items of ``total`` of the global batch in groups, as many as on any rank."""
        train, parallel = self._config.train, self._config.parallel
        count = num_micro_batches(
            total,
            self._view.dp,
            train.micro_batch,
            multiple=parallel.pp if parallel.vpp else 1,
        )
        return micro_batches(items, train.micro_batch, count)

    def _collate(
        self, rows: Sequence[Sequence[Document]], size: tuple[int, int] | None
    ) -> MicroBatch:
        batch = self._collator.collate(
            rows,
            pixels=self._pixels,
            codes=self._codes.get if self._codes is not None else None,
            size=size,
        )
        for name, amount in (
            ("sequences", len(rows)),
            ("empty_micro_batches", int(not rows)),
            ("positions", batch.document_BS.numel()),
            ("filled", sum(document.row.length for row in rows for document in row)),
        ):
            self._sums[name] += amount
        return batch

    def _documents(self, number: int) -> list[Document]:
        sample = self._built(number)
        keys = self._keys(sample)
        return [Document(row=row, sample_id=sample.id, keys=keys) for row in sample.rows]

    def _keys(self, sample: Sample) -> list[str]:
        if self._config.data.blank_images:
            return [BLANK_KEY] * len(sample.images)
        return [self._sources.key(path) for path in sample.images]

    def _pixels(self, keys: Sequence[str]) -> Tensor:
        return self._store.normalised(keys, self._sources.paths)

    def _usable(self, index: int) -> int | None:
        """The record, or the next usable one of its source; in ``eval`` None instead of another."""
        own = self._order.neighbours(index)
        for offset in range(len(own) if self._split == "train" else 1):
            candidate = own[(index - own.start + offset) % len(own)]
            if self._sources.is_good(candidate) and len(self._row_lengths(candidate)) > 0:
                return candidate
            kind = "replaced_samples" if self._split == "train" else "left_out_samples"
            self._count(kind, self._sources.records[index].id)
        if self._split == "eval":
            return None
        if not any(map(self._sources.is_good, own)):
            raise DataError(
                f"every image is bad in the source of {self._sources.records[index].id!r}; is "
                "data.*.images its right folder?"
            )
        dropping = self._config.data.on_overlong == "drop"
        raise DataError(
            f"no usable record: none of {len(own)} fits into data.max_length="
            f"{self._config.data.max_length}; raise it"
            + (", or set data.on_overlong=cut_text" if dropping else "")
        )

    def _row_lengths(self, number: int) -> Sequence[int]:
        if self._lengths is not None:
            return self._lengths[number]
        return [row.length for row in self._built(number).rows]

    def _built(self, index: int) -> Sample:
        if index in self._samples:
            self._samples.move_to_end(index)
            return self._samples[index]
        sample = self._builder.build(self._sources.records[index])
        self._note(sample)
        self._samples[index] = sample
        self._sample_positions += sum(row.length for row in sample.rows)
        while self._sample_positions > SAMPLE_CACHE_POSITIONS:
            _, old = self._samples.popitem(last=False)
            self._sample_positions -= sum(row.length for row in old.rows)
        return sample

    def _note(self, sample: Sample) -> None:
        repeated = len(sample.images) * max(0, len(sample.rows) - 1)
        for name, amount in (
            ("cut_tokens", sample.cut_tokens),
            ("dropped_rows", sample.dropped_rows),
            ("dropped_samples", int(not sample.rows)),
            ("lost_targets", sample.lost_targets),
            ("lost_first_patches", self._collator.lost_first_patches(sample)),
            ("repeated_images", repeated),
        ):
            if amount:
                self._count(name, sample.id, amount)

    def _count(self, name: str, sample_id: str, amount: int = 1) -> None:
        self._events.setdefault(name, {})[sample_id] = amount


def _check_official(sources: Sources) -> None:
    """Refuse what would make micro-batches of several sizes, whose means the mode would mix."""
    for number in np.flatnonzero(sources.num_conversations() > 1):
        record = sources.records[int(number)]
        raise ConfigError(
            f"loss.mode='official' knows one conversation a record, but {record.id!r} of "
            f"data.train holds {len(record.conversations)}; use loss.mode=exact, or give each "
            "conversation a record of its own"
        )
