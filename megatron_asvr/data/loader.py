"""The micro-batches of every step, for one rank.

A step is a pure function of (seed, step): the order names its records. A bad one, or one of which
nothing fits, keeps its place in the global batch but holds nothing: it adds to neither loss and to
neither count (every rank knows that alone, because all know the same bad images after ``prepare``).
Every rank plans the whole global batch from the lengths of its samples (plan.py) and takes its
part. All ranks have the same number of micro-batches; who runs out
of data has empty ones. One worker thread reads, decodes and collates ahead of the training step; it
alone touches the images.
"""

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

from megatron_asvr.platforms import select

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from megatron_asvr.batch import MicroBatch
from megatron_asvr.config.schema import Config
from megatron_asvr.data.augment import marked
from megatron_asvr.data.cache import CodeCache, FeatureCache
from megatron_asvr.data.collate import WHOLE, Collator, Document, View
from megatron_asvr.data.order import StepOrder, blend
from megatron_asvr.data.pixels import BLANK_KEY, ZERO_KEY, PixelStore
from megatron_asvr.data.plan import Imbalance, Planner, RowFacts
from megatron_asvr.data.sample import Row, Sample, SampleBuilder, SampleCache
from megatron_asvr.data.sources import Sources
from megatron_asvr.data.tally import Tally
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.errors import ConfigError, DataError

NAMED = 32  # samples of a global batch in an error message
PLANNED_STEPS = 32  # whose balance is told at the start


class Loader:
    """Micro-batches of a split; call :meth:`prepare` before anything else.

    Attributes:
        features: cache of a frozen encoder's features, set before the first step; None: computed.

    Args:
        config: the run's configuration.
        tokenizer: of the language model.
        split: ``train`` is shuffled and endless; ``eval`` meets every good sample once, in order.
        view: which part of every step this rank needs; default: everything.
        branches: whether attention keeps the conversations of one row apart; without it the
            images are repeated, one row a conversation.
        codes: cache of the visual tokenizer's codes; None when they are not needed or online.
        codebook_sizes: of that tokenizer, for the cost of an image; empty without a visual head.
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
        codebook_sizes: Sequence[int] = (),
        device: torch.device | None = None,
    ) -> None:
        self._config = config
        self._split = split
        self._view = view
        self._codes = codes
        self.features: FeatureCache | None = None
        device = device or select()[0].device
        self._sources = Sources(
            config, getattr(config.data, split), device=device, tokenizer=tokenizer
        )
        if split == "train" and config.loss.mode == "official":
            _check_official(self._sources)
        self._builder = SampleBuilder(config, tokenizer, branches=branches)
        self._layouts = self._builder.layouts
        self._lengths = self._sources.lengths(branches=branches)
        self._collator = Collator.from_config(
            config,
            tokenizer.pad_id,
            view=view,
            code_depth=codes.depth if codes is not None else 0,
            visual_share=config.loss.visual_positions if split == "train" else 1.0,
        )
        self._planner = Planner(config, codebook_sizes)
        self._store = PixelStore(config, device=device, verify=True)
        data = config.data
        self._augment = split == "train" and data.augment.is_on and not data.blank_images
        self._order = StepOrder(
            self._sources.sizes,
            config.train.global_batch,
            seed=config.run.seed,
            taken=blend(getattr(config.data, split), self._sources.sizes),
            shuffle=split == "train",
        )
        self._samples = SampleCache()
        platform = select()[0]
        self._worker = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix=f"asvr-{split}",
            initializer=platform.set_device,  # a thread begins with the first GPU
            initargs=(platform.device.index or 0,),
        )
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}
        self._tally = Tally()

    def prepare(self, *, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Check every image once; afterwards all ranks know the same bad ones.

        Args:
            group: ranks that share the work; all of them have to call. None: this process alone.

        Raises:
            DataError: images are missing or bad and ``data.on_bad_sample`` is ``fail``, more than
                ``data.max_bad_share`` of the records are bad, or no good record is left; or
                ``loss.mode=official``, whose means over micro-batches know no placeholder.
        """
        self._sources.prepare(group=group)
        if self._split == "train" and self._collator.official and self.num_bad(range(self.steps)):
            raise DataError(
                "loss.mode=official averages over micro-batches, so a bad sample cannot hold a "
                f"place without loss: {self._sources.bad_samples[0]} and others; set "
                "data.on_bad_sample=drop after `asvr data index`, or repair them"
            )

    @property
    def bad_samples(self) -> list[dict[str, str | None]]:
        """Source, id, image and reason of every bad sample of the split, as far as is known.

        Samples of which nothing fits are among them where an index has their lengths.
        """
        return self._sources.bad_samples

    def num_bad(self, steps: Iterable[int]) -> int:
        """Places of some steps that hold nothing because an image is bad."""
        numbers = (index for step in steps for index in self._order.indices(step))
        return sum(not self._sources.is_good(number) for number in numbers)

    @property
    def num_samples(self) -> int:
        """Records of the split, bad ones included."""
        return len(self._sources.records)

    @property
    def num_images(self) -> int:
        """Different images of the split, bad ones included."""
        return len({path for images in self._sources.images for path in images})

    def blend(self) -> list[tuple[str, int, int]]:
        """Name of every source, samples that an epoch takes from it, and how many it has."""
        names = [source.name or source.path for source in getattr(self._config.data, self._split)]
        return list(zip(names, self._order.taken, self._order.sizes, strict=True))

    @property
    def steps(self) -> int:
        """Steps of one epoch: enough to meet every record."""
        return self._order.steps

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, or of the one epoch of an evaluation."""
        settings = self._config.train
        if self._split == "eval":
            return self.steps
        if settings.steps is not None:
            return settings.steps
        return max(1, math.ceil(float(settings.epochs or 0.0) * self.steps))

    def step(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of one step; the next ones are prepared meanwhile.

        The list is as long on every rank, and a multiple of ``parallel.pp`` with ``parallel.vpp``.
        Micro-batches without documents fill it up.

        Raises:
            DataError: naming the step, the rank and the samples.
        """
        future = self._request(step)
        ahead = step + self._config.data.prefetch_batches
        last = max(step, min(ahead, self.total_steps - 1))
        for later in range(step + 1, last + 1):
            self._request(later)
        for other in [s for s in self._ahead if not step <= s <= last]:
            self._ahead.pop(other).cancel()
        del self._ahead[step]  # also when it failed, so that it can be asked for again
        return future.result()

    def sample_ids(self, step: int) -> list[str]:
        """Ids of the records of a global batch, in order, bad ones included."""
        return [self._sources.records[index].id for index in self._order.indices(step)]

    def imbalance(self, first_step: int) -> Imbalance:
        """How even the work of the data-parallel ranks is in the steps from ``first_step`` on.

        From the index over ``PLANNED_STEPS``; without one over one step, whose samples are built.
        """
        steps = range(first_step, first_step + (PLANNED_STEPS if self._lengths is not None else 1))
        plans = [self._planner.plan(self.facts(step)) for step in steps]
        return self._planner.imbalance(plans, self._view.dp)

    def facts(self, step: int) -> list[list[RowFacts]]:
        """Lengths and images of the rows of each sample of a global batch, in order."""
        return self._worker.submit(lambda: self._facts(self._numbers(step))).result()

    def samples(self, step: int) -> list[tuple[Sample, list[list[str]]]]:
        """The samples of a global batch, in order, each with the keys of every picture's views."""

        def built() -> list[tuple[Sample, list[list[str]]]]:
            numbers = self._numbers(step)
            found = zip(map(self._built, numbers), self._spots(step, numbers), strict=True)
            return [(sample, self._views(sample, sample.rows[0], spot)) for sample, spot in found]

        return self._worker.submit(built).result()

    def image_keys(self) -> list[str]:
        """Keys of all views of the split's good images; the same list on every rank."""
        keys = self._sources.good_image_keys()
        if self._config.data.blank_images and keys:
            keys = [BLANK_KEY]
        elif self._layouts.needs_sizes:
            sizes = (self._sources.size_of(key) for key in keys)
            layouts = (self._layouts.of(size) for size in sizes)
            keys = [view for x, key in zip(layouts, keys, strict=True) for view in x.keys(key)]
        return [*keys, ZERO_KEY] if self._collator.official else keys

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """float32 pixels [I, C, H, W] of some of :meth:`image_keys`."""
        keys = self.image_keys()
        return self.pixels_of([keys[index] for index in indices])

    def pixels_of(self, keys: Sequence[str]) -> Tensor:
        """float32 pixels [I, C, H, W] of the images with these keys, as the tokenizer sees them."""
        return self.crops_of(keys)[:: self._config.model.resolution.num_crops]

    def crops_of(self, keys: Sequence[str]) -> Tensor:
        """The same as the model's encoder sees them: all crops of each one after another."""
        return self._worker.submit(self._pixels, keys).result()

    def report(self) -> dict[str, Any]:
        """What was bad, cut, dropped or repeated, as plain values.

        Counts of samples are of different samples that this rank has met so far, and each sample of
        a step is counted by one data-parallel rank; ``bad_images`` and ``bad_records`` are of the
        whole split. ``sequences``, ``fill`` (the share of positions
        that are no padding) and ``empty_micro_batches`` are of all steps that were prepared.
        """
        caches = (self._codes, self.features)
        damaged = sum(len(cache.damaged) for cache in caches if cache is not None)
        whole = {**self._sources.report(), "damaged_code_parts": damaged}
        return {**whole, **self._tally.report()}

    def close(self) -> None:
        """Stop the worker; what it has begun is finished, the rest is forgotten."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
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
            ids = self.sample_ids(step)
            more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
            raise DataError(
                f"step {step}, data-parallel rank {self._view.dp_rank}, samples of the global "
                f"batch {', '.join(ids[:NAMED])}{more}: {error}"
            ) from error

    def _numbers(self, step: int) -> list[int]:
        """The records of a global batch that hold something, in order."""
        found = [index for index in self._order.indices(step) if self._usable(index)]
        if not found and self._split == "train":
            self._check_any_fits()
        return found

    def _spots(self, step: int, numbers: Sequence[int]) -> list[int]:
        """Where the records of a global batch stand in the concatenation of all steps."""
        good, first = set(numbers), step * self._config.train.global_batch
        indices = enumerate(self._order.indices(step), first)
        return [spot for spot, index in indices if index in good]

    def _facts(self, numbers: Sequence[int]) -> list[list[RowFacts]]:
        """What the plan looks at; where an index has the lengths, no sample is built for it."""
        facts = []
        for number in numbers:
            images = self._num_views(number) or int(self._collator.official)
            facts.append([RowFacts(length, images) for length in self._row_lengths(number)])
        return facts

    def _num_views(self, number: int) -> int:
        """Images that the encoder gets of a record."""
        if not self._layouts.needs_sizes:
            return len(self._sources.images[number])
        return sum(self._layouts.of(size).num_views for size in self._sources.sizes_of(number))

    def _rows(self, step: int) -> list[list[list[Document]]]:
        """The documents of every row of this rank's micro-batches."""
        self._note_placeholders(step)
        numbers = self._numbers(step)
        spots = self._spots(step, numbers)
        plan = self._planner.plan(self._facts(numbers))
        batches = []
        for group in self._planner.deal(plan, self._view.dp)[self._view.dp_rank]:
            items = [[self._document(numbers, spots, *row) for row in plan.items[i]] for i in group]
            packed = self._config.data.packing
            batches.append(items if packed else [[row] for item in items for row in item])
        return batches

    def _collate(
        self, rows: Sequence[Sequence[Document]], size: tuple[int, int] | None
    ) -> MicroBatch:
        batch = self._collator.collate(
            rows,
            pixels=self._pixels,
            codes=self._codes.get if self._codes is not None else None,
            features=self.features.features if self.features is not None else None,
            size=size,
        )
        self._tally.micro_batch(batch, rows)
        return batch

    def _document(
        self, numbers: Sequence[int], spots: Sequence[int], place: int, row: int
    ) -> Document:
        sample = self._built(numbers[place])
        if row == 0:  # rows of one sample may come to several ranks
            lost = self._collator.lost_first_patches(sample)
            self._tally.sample(numbers[place], sample, lost_first_patches=lost)
        views = self._views(sample, sample.rows[row], spots[place])
        keys = [key for own in views for key in own]
        return Document(
            row=sample.rows[row],
            sample_id=sample.id,
            keys=keys,
            place=(place, row),
            spot=spots[place],
        )

    def _views(self, sample: Sample, row: Row, spot: int) -> list[list[str]]:
        """Keys of the views of every picture."""
        if self._config.data.blank_images:
            return [[BLANK_KEY] * layout.num_views for layout in row.layouts]
        keys = [self._sources.key(path) for path in sample.images]
        if self._augment:
            keys = [marked(key, spot, image) for image, key in enumerate(keys)]
        return [layout.keys(key) for layout, key in zip(row.layouts, keys, strict=True)]

    def _pixels(self, keys: Sequence[str]) -> Tensor:
        return self._store.normalised(keys, self._sources.paths)

    def _usable(self, index: int) -> bool:
        """Whether a record holds anything."""
        return self._sources.is_good(index) and len(self._row_lengths(index)) > 0

    def _note_placeholders(self, step: int) -> None:
        """Count what holds nothing in a step that is trained on; planning it counts nothing."""
        if self._view.dp_rank:  # all ranks know; who adds their reports counts it once
            return
        for index in self._order.indices(step):
            if not self._usable(index):
                self._tally.count("placeholders", index)
                if self._sources.is_good(index):
                    self._tally.count("dropped_samples", index)

    def _check_any_fits(self) -> None:
        """Raise where no record can be trained on: that none of a step could be may be chance."""
        total = len(self._sources.records)
        if any(self._sources.is_good(n) and len(self._row_lengths(n)) for n in range(total)):
            return
        dropping = self._config.data.on_overlong == "drop"
        raise DataError(
            f"no usable record: none of {total} fits into data.max_length="
            f"{self._config.data.max_length}; raise it"
            + (", or set data.on_overlong=cut_text" if dropping else "")
        )

    def _row_lengths(self, number: int) -> Sequence[int]:
        if self._lengths is not None:
            return self._lengths[number]
        return [row.length for row in self._built(number).rows]

    def _built(self, index: int) -> Sample:
        return self._samples.get(index, lambda: self._build(index))

    def _build(self, index: int) -> Sample:
        sizes = self._sources.sizes_of(index) if self._layouts.needs_sizes else ()
        return self._builder.build(self._sources.records[index], sizes)


def _check_official(sources: Sources) -> None:
    """Refuse what would make micro-batches of several sizes, whose means the mode would mix."""
    for number in np.flatnonzero(sources.num_conversations() > 1):
        record = sources.records[int(number)]
        raise ConfigError(
            f"loss.mode='official' knows one conversation a record, but {record.id!r} of "
            f"data.train holds {len(record.conversations)}; use loss.mode=exact, or give each "
            "conversation a record of its own"
        )
