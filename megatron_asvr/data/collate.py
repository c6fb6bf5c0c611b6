"""Documents to one micro-batch: padding, who holds which column, and which position predicts what.

A row holds one document or, packed, several. All rows end to end are one stream of positions;
everything is laid out in the stream first and then arranged so that every context-parallel rank
holds one block of columns (parallel/context.py). One path serves all layouts: an unpacked row is
a row of one document, an empty micro-batch has rows without any.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from megatron_asvr.batch import IGNORE, NO_POSITION, MicroBatch, image_share
from megatron_asvr.config.schema import Config
from megatron_asvr.data.pixels import ZERO_KEY
from megatron_asvr.data.sample import Row, Sample
from megatron_asvr.data.subsample import drawn
from megatron_asvr.data.views import NEWLINE
from megatron_asvr.parallel.context import (
    document_multiple,
    padded_lengths,
    partition,
    row_multiple,
)
from megatron_asvr.precision.fp8.shapes import position_multiple

Pixels = Callable[[Sequence[str]], Tensor]  # image keys to float32 [I, C, H, W]
Codes = Callable[[str], np.ndarray]  # image key to codes [N, D]
Features = Callable[[Sequence[str]], Tensor]  # image keys to features [I, N, F]


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What one rank sees of a step; by default everything.

    Attributes:
        dp_rank: this rank among the data-parallel ranks.
        dp: number of those ranks.
        cp_rank: this rank among those that share the sequences (``parallel.cp`` of them).
        encoder_rank: this rank among those that share the images of a micro-batch.
        encoder_world: number of those ranks.
        first_stage: it embeds tokens and images.
        text_loss: it computes the text loss.
        visual_loss: it computes the visual loss.
    """

    dp_rank: int = 0
    dp: int = 1
    cp_rank: int = 0
    encoder_rank: int = 0
    encoder_world: int = 1
    first_stage: bool = True
    text_loss: bool = True
    visual_loss: bool = True


WHOLE = View()


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A row of a sample with what a micro-batch must know beside it.

    Attributes:
        row: tokens, targets and places of images.
        sample_id: the record's id.
        keys: of all views of the row's images, in order (data/views.py).
        place: place of the sample in the global batch, and number of the row among its rows.
        spot: place of the sample in the concatenation of all steps.
    """

    row: Row
    sample_id: str
    keys: Sequence[str]
    place: tuple[int, int] = (0, 0)
    spot: int = 0

    def digest(self) -> int:
        """48 bits of a hash of the row, its images and its place; sums of them never overflow."""
        row = self.row
        found = blake2b(repr((self.place, list(self.keys), row.image_starts)).encode())
        for values in (row.tokens_S, row.targets_S, row.positions_S, row.branch_S):
            found.update(np.ascontiguousarray(values))
        return int.from_bytes(found.digest()[:6], "little")


@dataclass(frozen=True, kw_only=True, slots=True)
class Collator:
    """Settings of all micro-batches.

    Attributes:
        num_patches: patches of one view of an image.
        pad_id: token of padding positions.
        target_shift: 0: a position predicts its own patch; 1: the position before it does.
        official: a sample without image gets an image of zeros that is not in its sequence.
        online: codes are computed from pixels, where the visual loss is.
        cp: ranks that share the sequences.
        document_multiple: documents are padded to a multiple of it.
        row_multiple: rows are padded to a multiple of it.
        view: what this rank sees.
        code_depth: depths of the codes, when they come from the cache.
        visual_share: of an image's positions that are drawn for the visual loss.
        seed: of that draw.
    """

    num_patches: int
    pad_id: int
    target_shift: int
    official: bool
    online: bool = False
    cp: int = 1
    document_multiple: int = 1
    row_multiple: int = 1
    view: View = WHOLE
    code_depth: int = 0
    visual_share: float = 1.0
    seed: int = 0

    @classmethod
    def from_config(
        cls,
        config: Config,
        pad_id: int,
        *,
        view: View = WHOLE,
        code_depth: int = 0,
        visual_share: float = 1.0,
    ) -> "Collator":
        """The collator of a run."""
        degrees = config.parallel
        shares = {"tp": degrees.tp, "cp": degrees.cp, "sp": degrees.sp}
        ranks = degrees.cp * (degrees.tp if degrees.sp else 1)
        return cls(
            num_patches=config.model.vision.num_patches,
            pad_id=pad_id,
            target_shift=config.loss.target_shift,
            official=config.loss.mode == "official",
            online=config.data.codes == "online" and config.loss.visual_weight != 0,
            cp=degrees.cp,
            document_multiple=document_multiple(**shares),
            row_multiple=math.lcm(
                row_multiple(**shares), ranks * position_multiple(config.precision.fp8)
            ),
            view=view,
            code_depth=code_depth,
            visual_share=visual_share,
            seed=config.run.seed,
        )

    def padded_length(self, length: int) -> int:
        """Positions that a document takes in its row."""
        return padded_lengths([length], self.document_multiple)[0]

    def size(self, batches: Sequence[Sequence[Sequence[Document]]]) -> tuple[int, int]:
        """Rows and row length that hold every one of some micro-batches.

        Args:
            batches: micro-batches of rows of documents.
        """
        taken = [sum(self.padded_length(d.row.length) for d in row) for b in batches for row in b]
        length = padded_lengths([max(taken, default=0)], self.row_multiple)[0]
        return max([1, *map(len, batches)]), max(length, self.row_multiple)

    def collate(
        self,
        rows: Sequence[Sequence[Document]],
        *,
        pixels: Pixels,
        codes: Codes | None,
        features: Features | None = None,
        size: tuple[int, int] | None = None,
    ) -> MicroBatch:
        """The micro-batch of ``rows``.

        Args:
            rows: of one or several documents each; none at all makes an empty micro-batch.
            pixels: decodes images; asked for this rank's share, where pixels are needed.
            codes: looks up an image's codes, where the visual loss is; None when they are computed
                online, or not at all.
            features: looks up images' features, which the first stage then need not compute.
            size: number and length of rows, with padding; default: :meth:`size` of ``rows``.
        """
        documents = [document for row in rows for document in row]
        stream = _Stream(self, rows, size or self.size([rows]))
        images = _Images(self)
        for document, start in zip(documents, stream.starts, strict=True):
            images.add(document, start)
        found = [document.row for document in documents]
        numbers = [np.full(row.length, number) for number, row in enumerate(found)]
        first, text = self.view.first_stage, self.view.text_loss
        patches, visual = self._patches(stream, images), self._visual_targets(stream, images)
        encoded = first and features is not None
        decode = images.keys and (first or (self.view.visual_loss and self.online)) and not encoded
        share = image_share(len(images.keys), self.view.encoder_rank, self.view.encoder_world)
        mine = images.keys[slice(*share)]
        return MicroBatch(
            tokens_BS=stream.own([r.tokens_S for r in found], self.pad_id) if first else None,
            text_targets_BS=stream.own([r.targets_S for r in found], IGNORE) if text else None,
            position_ids_BS=stream.whole([row.positions_S for row in found], 0),
            document_BS=stream.whole(numbers, -1, np.int32),
            branch_BS=stream.whole([row.branch_S for row in found], 0, np.int32),
            index_BS=torch.from_numpy(stream.columns_BS % stream.columns_BS.shape[1]),
            cu_seqlens=torch.from_numpy(stream.cu_seqlens),
            cu_seqlens_padded=torch.from_numpy(stream.cu_seqlens_padded),
            image_positions_P=patches[0],
            image_patches_P=patches[1],
            newline_positions=self._newlines(stream, images),
            pixel_values_ICHW=pixels(mine) if decode else None,
            features_INF=features(mine) if encoded and images.keys and features else None,
            image_share=share,
            num_images=len(images.keys),
            visual_positions_M=visual[0],
            visual_patches_M=visual[1],
            visual_left_out=visual[2],
            visual_scale=1 / self.visual_share,
            codes_PD=self._codes(images.keys, codes),
            sample_ids=[document.sample_id for document in documents],
            image_keys=images.keys,
            digest=sum(document.digest() for document in documents),
            context=(self.view.cp_rank, self.cp),
        )

    def lost_first_patches(self, sample: Sample) -> int:
        """Patches without a position before them to predict them.

        Those that begin a document, or follow a newline, which predicts nothing.
        """
        if self.target_shift == 0:
            return 0
        rows = [row for row in sample.rows if row.counts_images]
        return sum(int((~seen).sum()) for row in rows for seen in _predicted(row, 1))

    def _patches(self, stream: "_Stream", images: "_Images") -> tuple[Tensor, Tensor]:
        """Flat positions of the patches that this rank embeds, and which patches they are."""
        if not self.view.first_stage:
            return _join([]), _join([])
        own_P = stream.own_places(_join(images.positions))
        inside_P = own_P != NO_POSITION
        return own_P[inside_P], _join(images.patches)[inside_P]

    def _newlines(self, stream: "_Stream", images: "_Images") -> Tensor:
        """Flat positions of the newlines that this rank embeds."""
        if not self.view.first_stage:
            return _join([])
        own = stream.own_places(_join(images.newlines))
        return own[own != NO_POSITION]

    def _visual_targets(self, stream: "_Stream", images: "_Images") -> tuple[Tensor, Tensor, int]:
        """Flat positions of this rank that predict a patch, which patch, and how many others do."""
        if not self.view.visual_loss:
            return _join([]), _join([]), 0
        sources_M = _join(images.sources)
        own_M = stream.own_places(sources_M)
        here_M = own_M != NO_POSITION
        if self.view.cp_rank == 0:  # a target that has lost its position counts all the same
            here_M |= sources_M == NO_POSITION
        chosen_M = here_M & _join(images.drawn).bool()
        left_out = int(here_M.sum() - chosen_M.sum())
        return own_M[chosen_M], _join(images.targets)[chosen_M], left_out

    def _codes(self, keys: Sequence[str], codes: Codes | None) -> Tensor | None:
        if codes is None or not self.view.visual_loss:
            return None
        found = [torch.from_numpy(codes(key).astype(np.int64)) for key in keys]
        return torch.cat(found) if found else torch.empty(0, self.code_depth, dtype=torch.int64)


class _Stream:
    """Where every document lies in the stream, and every position of the stream in the columns.

    Attributes:
        starts: first position of each document.
        cu_seqlens: int32 sums of the documents' lengths; a row without any counts as one of 0.
        cu_seqlens_padded: int32 where each of them starts, and the end of the stream.
        columns_BS: int64 position in the stream that each column of each row holds.
    """

    def __init__(
        self, collator: Collator, rows: Sequence[Sequence[Document]], size: tuple[int, int]
    ) -> None:
        self._rank, self._ways = collator.view.cp_rank, collator.cp
        self._total = size[0] * size[1]
        lengths, edges = [], []
        for number in range(size[0]):
            row = rows[number] if number < len(rows) else ()
            start = number * size[1]
            for length in [document.row.length for document in row] or [0]:
                lengths.append(length)
                edges.append(start)
                start += collator.padded_length(length)
        self.starts = [start for start, n in zip(edges, lengths, strict=True) if n]
        self.cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
        self.cu_seqlens_padded = np.array([*edges, self._total], dtype=np.int32)
        ranks = [
            partition(self.cu_seqlens_padded, self._total, self._ways, rank).reshape(size[0], -1)
            for rank in range(self._ways)
        ]
        self.columns_BS = np.concatenate(ranks, axis=1).astype(np.int64)
        own = torch.from_numpy(ranks[self._rank].flatten().astype(np.int64))
        # One more, so that NO_POSITION stays NO_POSITION.
        self._places = torch.full((self._total + 1,), NO_POSITION)
        self._places[own] = torch.arange(len(own))

    def whole(self, parts: Sequence[np.ndarray], fill: int, dtype: type = np.int64) -> Tensor:
        """One value a position, from one part a document, in the order of the columns: [B, S]."""
        stream = np.full(self._total, fill, dtype=dtype)
        for part, start in zip(parts, self.starts, strict=True):
            stream[start : start + len(part)] = part
        return torch.from_numpy(stream[self.columns_BS])

    def own(self, parts: Sequence[np.ndarray], fill: int) -> Tensor:
        """The same for this rank's columns."""
        return self.whole(parts, fill).chunk(self._ways, dim=1)[self._rank].contiguous()

    def own_places(self, positions: Tensor) -> Tensor:
        """Flat positions in this rank's part of positions of the stream, or NO_POSITION."""
        return self._places[positions]


class _Images:
    """Collects the images of a micro-batch, in the order of its documents.

    Attributes:
        keys: of each view.
        positions: of patches in the stream; NO_POSITION where they were cut away.
        patches: which patch each of those positions holds.
        newlines: positions of newlines in the stream.
        sources: positions in the stream that predict a patch; NO_POSITION for none.
        targets: the patches that they predict.
        drawn: which of them count.
    """

    def __init__(self, collator: Collator) -> None:
        self._shift, self._official = collator.target_shift, collator.official
        self._num_patches = collator.num_patches
        self.keys: list[str] = []
        self.positions: list[np.ndarray] = []
        self.patches: list[np.ndarray] = []
        self.newlines: list[np.ndarray] = []
        self.sources: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.drawn: list[np.ndarray] = []
        self._share, self._seed = collator.visual_share, collator.seed

    def add(self, document: Document, place: int) -> None:
        """Add the images of the document that starts at ``place``."""
        row, before = document.row, len(self.keys)
        images = zip(row.image_starts, row.layouts, _predicted(row, self._shift), strict=True)
        for number, (start, layout, seen) in enumerate(images):
            is_patch = layout.patches_L != NEWLINE
            patches = before * self._num_patches + layout.patches_L[is_patch]
            places = start + np.flatnonzero(is_patch)
            if row.counts_images:
                sources = _in_stream(places - self._shift, row.length, place)
                one = {"seed": self._seed, "spot": document.spot, "image": number}
                chosen = drawn(int(seen.sum()), self._share, **one)
                self._supervise(sources[seen], patches[seen], chosen)
            self._show(_in_stream(places, row.length, place), patches)
            newlines = start + np.flatnonzero(~is_patch)
            self.newlines.append(_in_stream(newlines, row.length, place))
            before += layout.num_views
        self.keys += document.keys
        if self._official and not row.image_starts:
            patches = before * self._num_patches + np.arange(self._num_patches)
            nowhere = np.full_like(patches, NO_POSITION)
            self._supervise(nowhere, patches, np.ones_like(patches, dtype=bool))
            self._show(nowhere, patches)
            self.keys.append(ZERO_KEY)

    def _show(self, positions: np.ndarray, patches: np.ndarray) -> None:
        self.positions.append(positions)
        self.patches.append(patches)

    def _supervise(self, sources: np.ndarray, patches: np.ndarray, chosen: np.ndarray) -> None:
        self.sources.append(sources)
        self.targets.append(patches)
        self.drawn.append(chosen)


def _predicted(row: Row, shift: int) -> Iterator[np.ndarray]:
    """For each image, which of its patches have a position ``shift`` earlier that predicts them."""
    images = list(zip(row.image_starts, row.layouts, strict=True))
    newlines = [start + np.flatnonzero(x.patches_L == NEWLINE) for start, x in images]
    for start, layout in images:
        sources = start + np.flatnonzero(layout.patches_L != NEWLINE) - shift
        yield (sources >= 0) & ~np.isin(sources, np.concatenate(newlines))


def _in_stream(positions: np.ndarray, length: int, place: int) -> np.ndarray:
    """Positions of a document in the stream, NO_POSITION behind its end."""
    return np.where(positions < length, place + positions, NO_POSITION)


def _join(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.int64)
