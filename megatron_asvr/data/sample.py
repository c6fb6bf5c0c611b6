"""One record to token rows: images expanded, targets shifted, branches laid out.

Independent conversations about the same images share them: BOS and everything up to the last image
token are branch 0, the rest of each conversation is a branch of its own, whose positions continue
right after the prefix. A branch therefore has the ids, positions and targets of a sample that asks
it alone. Where the attention in use cannot do that (``branches=False``) each conversation is a row
of its own; the images are repeated, and only the first copy counts in the visual loss.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_asvr.batch import IGNORE
from megatron_asvr.config.schema import Config
from megatron_asvr.data.conversation import render
from megatron_asvr.data.records import Record
from megatron_asvr.data.templates import find_template
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.data.views import ImageLayout, ImageLayouts, Size
from megatron_asvr.errors import ConfigError

CACHED_POSITIONS = 2_000_000  # of samples kept in memory, 28 bytes each


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One sequence of positions, one document.

    Attributes:
        tokens_S: int64 ids; an image is one copy of the image token for each of its positions.
        targets_S: int64, the id that each position predicts, or IGNORE.
        positions_S: int64 rotary positions.
        branch_S: int32, 0 for the shared prefix.
        image_starts: position of each image's first patch (``official`` mode only: it may lie
            behind the cut).
        layouts: what the positions of each image hold.
        counts_images: whether the images count in the visual loss (one copy of them does).
    """

    tokens_S: np.ndarray
    targets_S: np.ndarray
    positions_S: np.ndarray
    branch_S: np.ndarray
    image_starts: tuple[int, ...]
    layouts: tuple[ImageLayout, ...]
    counts_images: bool = True

    @property
    def length(self) -> int:
        """Positions."""
        return len(self.tokens_S)

    @property
    def images_end(self) -> int:
        """First position behind the last image; 0 without images."""
        return self.image_starts[-1] + self.layouts[-1].length if self.image_starts else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One record as rows; without rows it did not fit and has to be replaced.

    Attributes:
        id: the record's id.
        images: paths of the record's images; every row shows all of them, in this order.
        rows: one, or one a conversation when images are repeated.
        cut_tokens: text positions cut from the end to fit ``data.max_length``.
        dropped_rows: rows that did not fit.
        dropped_tokens: text positions of those rows.
        lost_targets: supervised tokens right after a prefix shared by several branches, where no
            single position could predict them, or first of all, where there is no position.
        text_tokens: tokens of the record's text, before anything is cut.
    """

    id: str
    images: tuple[str, ...]
    rows: tuple[Row, ...]
    cut_tokens: int = 0
    dropped_rows: int = 0
    dropped_tokens: int = 0
    lost_targets: int = 0
    text_tokens: int = 0

    @property
    def num_positions(self) -> int:
        """Positions of all rows."""
        return sum(row.length for row in self.rows)


class SampleCache:
    """Samples that were built lately, by number; old ones go when they take too much memory."""

    def __init__(self) -> None:
        self._samples: OrderedDict[int, Sample] = OrderedDict()
        self._positions = 0

    def get(self, number: int, build: Callable[[], Sample]) -> Sample:
        """A sample, built where it is not there."""
        if number in self._samples:
            self._samples.move_to_end(number)
            return self._samples[number]
        sample = build()
        self._samples[number] = sample
        self._positions += sample.num_positions
        while self._positions > CACHED_POSITIONS:
            _, old = self._samples.popitem(last=False)
            self._positions -= old.num_positions
        return sample


@dataclass(frozen=True, slots=True)
class _Piece:
    """Ids with their supervision, images already expanded."""

    ids: list[int]
    supervised: list[bool]
    image_starts: list[int]
    layouts: Sequence[ImageLayout]

    @property
    def images_end(self) -> int:
        """First position behind the last image; 0 without images."""
        return self.image_starts[-1] + self.layouts[-1].length if self.image_starts else 0

    @property
    def num_words(self) -> int:
        """Positions that no image takes."""
        return len(self.ids) - sum(layout.length for layout in self.layouts)

    def head(self, stop: int) -> "_Piece":
        return _Piece(self.ids[:stop], self.supervised[:stop], self.image_starts, self.layouts)

    def tail(self, start: int) -> "_Piece":
        return _Piece(self.ids[start:], self.supervised[start:], [], ())


class SampleBuilder:
    """Turns records into samples.

    Args:
        config: template, lengths, policy, loss mode and views of images.
        tokenizer: of the language model.
        branches: whether attention can keep conversations of one row apart.

    Raises:
        ConfigError: the tokenizer has ids that the language model does not.
    """

    def __init__(self, config: Config, tokenizer: TextTokenizer, *, branches: bool) -> None:
        vocab_size = config.model.language.vocab_size
        if tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                f"model.language.vocab_size={vocab_size} is smaller than the "
                f"{tokenizer.vocab_size} ids of model.text_tokenizer={tokenizer.path} (with "
                f"<image>); set it to at least {tokenizer.vocab_size}"
            )
        self.tokenizer = tokenizer
        self.template = find_template(config.data.template, tokenizer)
        self.branches = branches
        self.layouts = ImageLayouts(config.model)
        self.max_length = config.data.max_length
        self.drop_overlong = config.data.on_overlong == "drop"
        self.official = config.loss.mode == "official"

    def build(self, record: Record, sizes: Sequence[Size] = ()) -> Sample:
        """The record's sample; its rows are empty when nothing of it fits.

        Args:
            record: what to build.
            sizes: height and width of each of its images, where ``layouts.needs_sizes``.
        """
        layouts = self.layouts.of_all(sizes, len(record.images))
        pieces = [self._piece(turns, layouts) for turns in record.conversations]
        if len(pieces) > 1 and self.branches:
            shared = max(len(self.tokenizer.begin), pieces[0].images_end)
            lost = sum(p.supervised[shared] for p in pieces)
            rows = [_branched(pieces, shared)]
        else:
            lost = sum(p.supervised[0] for p in pieces)  # without a begin token
            rows = [_flat(piece) for piece in pieces]
        fitted = [self._fit(row) for row in rows]
        kept = [row for row in fitted if row is not None]
        return Sample(
            id=record.id,
            images=record.images,
            rows=tuple(_count_images_once(kept)),
            cut_tokens=sum(
                row.length - cut.length
                for row, cut in zip(rows, fitted, strict=True)
                if cut is not None
            ),
            dropped_rows=len(rows) - len(kept),
            dropped_tokens=sum(
                row.length - sum(layout.length for layout in row.layouts)
                for row, cut in zip(rows, fitted, strict=True)
                if cut is None
            ),
            lost_targets=lost,
            text_tokens=sum(piece.num_words for piece in pieces),
        )

    def expand(
        self, ids: Sequence[int], layouts: Iterable[ImageLayout]
    ) -> tuple[list[int], list[int]]:
        """``ids`` with every image token repeated for its positions, and where each image starts.

        Args:
            ids: of a text.
            layouts: of its images; no more are taken than the text has.
        """
        out: list[int] = []
        starts = []
        following = iter(layouts)
        for token in ids:
            if token == self.tokenizer.image_id:
                starts.append(len(out))
                out.extend([token] * next(following).length)
            else:
                out.append(token)
        return out, starts

    def _piece(self, turns: Sequence, layouts: Sequence[ImageLayout]) -> _Piece:
        begin = self.tokenizer.begin
        ids, supervised, starts = [*begin], [False] * len(begin), []
        following = iter(layouts)
        for segment in render(turns, self.template, self.tokenizer):
            expanded, inside = self.expand(segment.ids, following)
            starts.extend(len(ids) + start for start in inside)
            ids.extend(expanded)
            supervised.extend([segment.supervised] * len(expanded))
        return _Piece(ids, supervised, starts, layouts)

    def _fit(self, row: Row) -> Row | None:
        """The row within ``max_length``, or None when it has to be dropped."""
        overlong = row.length > self.max_length
        hopeless = self.drop_overlong or row.images_end > self.max_length
        if overlong and hopeless and not self.official:
            return None
        cut = _cut(row, self.max_length) if overlong else row
        teaches = bool(cut.image_starts) or bool((cut.targets_S != IGNORE).any())
        return cut if teaches or self.official else None


def _targets(piece: _Piece) -> np.ndarray:
    ids = np.asarray(piece.ids[1:], dtype=np.int64)
    targets = np.full(len(piece.ids), IGNORE, dtype=np.int64)
    targets[:-1] = np.where(np.asarray(piece.supervised[1:], dtype=bool), ids, IGNORE)
    return targets


def _flat(piece: _Piece) -> Row:
    length = len(piece.ids)
    return Row(
        tokens_S=np.asarray(piece.ids, dtype=np.int64),
        targets_S=_targets(piece),
        positions_S=np.arange(length, dtype=np.int64),
        branch_S=np.zeros(length, dtype=np.int32),
        image_starts=tuple(piece.image_starts),
        layouts=tuple(piece.layouts),
    )


def _branched(pieces: Sequence[_Piece], shared: int) -> Row:
    parts = [pieces[0].head(shared), *(piece.tail(shared) for piece in pieces)]
    lengths = [len(part.ids) for part in parts]
    offsets = [0, *[shared] * len(pieces)]
    return Row(
        tokens_S=np.concatenate([np.asarray(p.ids, dtype=np.int64) for p in parts]),
        targets_S=np.concatenate([_targets(p) for p in parts]),
        positions_S=np.concatenate(
            [np.arange(o, o + n, dtype=np.int64) for o, n in zip(offsets, lengths, strict=True)]
        ),
        branch_S=np.repeat(np.arange(len(parts), dtype=np.int32), lengths),
        image_starts=tuple(pieces[0].image_starts),
        layouts=tuple(pieces[0].layouts),
    )


def _cut(row: Row, length: int) -> Row:
    targets_S = row.targets_S[:length].copy()
    targets_S[-1] = IGNORE  # it predicted a token that is gone
    return replace(
        row,
        tokens_S=row.tokens_S[:length],
        targets_S=targets_S,
        positions_S=row.positions_S[:length],
        branch_S=row.branch_S[:length],
    )


def _count_images_once(rows: Sequence[Row]) -> list[Row]:
    return [replace(row, counts_images=number == 0) for number, row in enumerate(rows)]
