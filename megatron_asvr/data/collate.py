"""Samples to one micro-batch: padding, positions of images, and which position predicts what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_asvr.batch import IGNORE, NO_POSITION, MicroBatch, image_share
from megatron_asvr.config.schema import Config
from megatron_asvr.data.pixels import ZERO_KEY
from megatron_asvr.data.sample import Row, Sample

Pixels = Callable[[Sequence[str]], Tensor]  # image keys to float32 [I, C, H, W]
Codes = Callable[[str], np.ndarray]  # image key to codes [N, D]


@dataclass(kw_only=True, slots=True)
class Collator:
    """Settings of all micro-batches.

    Attributes:
        num_patches: patches of one image.
        pad_id: token of padding positions.
        target_shift: 0: a position predicts its own patch; 1: the position before it does.
        official: a sample without image gets an image of zeros that is not in its sequence.
        length_multiple: sequence lengths are padded to a multiple of it.
        encoder_rank: this rank within those that share the images of a micro-batch.
        encoder_world: number of those ranks.
        code_depth: depths of the codes, when they come from the cache.
    """

    num_patches: int
    pad_id: int
    target_shift: int
    official: bool
    length_multiple: int = 1
    encoder_rank: int = 0
    encoder_world: int = 1
    code_depth: int = 0

    @classmethod
    def from_config(
        cls,
        config: Config,
        pad_id: int,
        *,
        encoder_rank: int = 0,
        encoder_world: int = 1,
        code_depth: int = 0,
    ) -> "Collator":
        """The collator of a run; under sequence parallelism each rank holds 1/tp of a sequence."""
        return cls(
            num_patches=config.model.vision.num_patches,
            pad_id=pad_id,
            target_shift=config.loss.target_shift,
            official=config.loss.mode == "official",
            length_multiple=config.parallel.tp if config.parallel.sp else 1,
            encoder_rank=encoder_rank,
            encoder_world=encoder_world,
            code_depth=code_depth,
        )

    def padded_length(self, samples: Sequence[Sample]) -> int:
        """Length of the longest row, rounded up."""
        longest = max(row.length for sample in samples for row in sample.rows)
        return -(-longest // self.length_multiple) * self.length_multiple

    def collate(
        self,
        samples: Sequence[Sample],
        keys: Sequence[Sequence[str]],
        *,
        pixels: Pixels,
        codes: Codes | None,
        length: int | None = None,
    ) -> MicroBatch:
        """The micro-batch of ``samples``, whose rows become its rows in order.

        Args:
            samples: with at least one row each.
            keys: content keys of each sample's images.
            pixels: decodes images; asked for this rank's share only.
            codes: looks up an image's codes; None when they are computed online, or not at all.
            length: sequence length; default: :meth:`padded_length`.
        """
        rows = [row for sample in samples for row in sample.rows]
        row_keys = [k for sample, k in zip(samples, keys, strict=True) for _ in sample.rows]
        size = (len(rows), length or self.padded_length(samples))
        images = _Images(self, size[1])
        for number, (row, these) in enumerate(zip(rows, row_keys, strict=True)):
            images.add_row(number, row, these)
        positions_P = _join(images.positions)
        inside_P = positions_P != NO_POSITION
        share = image_share(len(images.keys), self.encoder_rank, self.encoder_world)
        return MicroBatch(
            tokens_BS=_stack([row.tokens_S for row in rows], size, self.pad_id),
            position_ids_BS=_stack([row.positions_S for row in rows], size, 0),
            text_targets_BS=_stack([row.targets_S for row in rows], size, IGNORE),
            document_BS=_stack([np.zeros_like(row.branch_S) for row in rows], size, -1),
            branch_BS=_stack([row.branch_S for row in rows], size, 0),
            index_BS=torch.arange(size[1]).repeat(len(rows), 1),
            image_positions_P=positions_P[inside_P],
            image_patches_P=inside_P.nonzero().squeeze(1),
            pixel_values_ICHW=pixels(images.keys[slice(*share)]) if images.keys else None,
            image_share=share,
            num_images=len(images.keys),
            visual_positions_M=_join(images.visual_positions),
            visual_patches_M=_join(images.visual_patches),
            codes_PD=self._codes(images.keys, codes),
            sample_ids=[sample.id for sample in samples],
        )

    def lost_first_patches(self, samples: Sequence[Sample]) -> int:
        """Images whose first patch has no position before it that could predict it."""
        if self.target_shift == 0:
            return 0
        return sum(
            row.image_starts.count(0) for s in samples for row in s.rows if row.counts_images
        )

    def _codes(self, keys: Sequence[str], codes: Codes | None) -> Tensor | None:
        if codes is None:
            return None
        found = [torch.from_numpy(codes(key).astype(np.int64)) for key in keys]
        return torch.cat(found) if found else torch.empty(0, self.code_depth, dtype=torch.int64)


class _Images:
    """Collects the images of a micro-batch, in the order of its rows."""

    def __init__(self, collator: Collator, length: int) -> None:
        self.num_patches, self.shift = collator.num_patches, collator.target_shift
        self.official, self.length = collator.official, length
        self.keys: list[str] = []
        self.positions: list[np.ndarray] = []
        self.visual_positions: list[np.ndarray] = []
        self.visual_patches: list[np.ndarray] = []

    def add_row(self, number: int, row: Row, keys: Sequence[str]) -> None:
        patches = np.arange(self.num_patches, dtype=np.int64)
        for key, start in zip(keys, row.image_starts, strict=True):
            place = number * self.length
            inside = _flat_positions(start + patches, row.length, place)
            if row.counts_images:
                # A patch is predicted `shift` positions earlier; before position 0 there is none.
                seen = start + patches >= self.shift
                source = _flat_positions(start + patches - self.shift, row.length, place)
                self._supervise(source[seen], patches[seen])
            self._add(key, inside)
        if self.official and not row.image_starts:
            nowhere = np.full(self.num_patches, NO_POSITION, dtype=np.int64)
            self._supervise(nowhere, patches)
            self._add(ZERO_KEY, nowhere)

    def _add(self, key: str, positions: np.ndarray) -> None:
        self.keys.append(key)
        self.positions.append(positions)

    def _supervise(self, positions: np.ndarray, patches: np.ndarray) -> None:
        self.visual_positions.append(positions)
        self.visual_patches.append(len(self.keys) * self.num_patches + patches)


def _flat_positions(positions: np.ndarray, row_length: int, place: int) -> np.ndarray:
    """Index into the flattened micro-batch, or NO_POSITION behind the end of the row."""
    return np.where(positions < row_length, place + positions, NO_POSITION)


def _stack(rows: Sequence[np.ndarray], size: tuple[int, int], fill: int) -> Tensor:
    out = np.full(size, fill, dtype=rows[0].dtype)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return torch.from_numpy(out)


def _join(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.int64)
