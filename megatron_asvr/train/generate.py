"""Greedy answers: every row of a batch is one question asked alone.

There is no key/value cache: answers of visual question answering are a few tokens, and running the
training forward again keeps one code path, so what is evaluated is what was trained. Images are
encoded once per batch however many rows ask about them; rows that are finished leave the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_asvr.platforms import select

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_asvr.batch import IGNORE, MicroBatch, image_share
from megatron_asvr.model.asvr import AsvrModel
from megatron_asvr.parallel.groups import Groups

Pixels = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One question, ready for the model.

    Attributes:
        token_ids: the prompt, image tokens expanded to one per position of the image.
        image_positions: position of every patch.
        image_patches: which patch that is: view * N + patch.
        newline_positions: positions of the newline vector.
        images: key of each view of an image (data/views.py); equal keys are the same view.
    """

    token_ids: tuple[int, ...]
    image_positions: tuple[int, ...]
    image_patches: tuple[int, ...]
    newline_positions: tuple[int, ...]
    images: tuple[str, ...]


class Generator:
    """Generates with one model.

    Args:
        model: in evaluation mode, the same on every tensor-parallel rank.
        pixels: float32 pixels [I, C, H, W] of the images with the given keys.
        groups: process groups of this rank.
        eos_id: token that ends an answer.
        max_new_tokens: longest answer.
        rows: questions of one batch.
    """

    def __init__(
        self,
        model: AsvrModel,
        pixels: Pixels,
        *,
        groups: Groups,
        eos_id: int,
        max_new_tokens: int = 32,
        rows: int = 64,
    ) -> None:
        self._model, self._pixels, self._groups = model, pixels, groups
        self._eos_id, self._max_new_tokens, self._rows = eos_id, max_new_tokens, rows

    @torch.no_grad()
    def answers(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, list[int]]]:
        """Yield (index of the prompt, new token ids without the end token), batch by batch."""
        # Prompts of one length and one image meet in one batch: little padding, few encodings.
        order = sorted(
            range(len(prompts)), key=lambda i: (len(prompts[i].token_ids), prompts[i].images, i)
        )
        for start in range(0, len(order), self._rows):
            chosen = order[start : start + self._rows]
            yield from zip(chosen, self._batch([prompts[i] for i in chosen]), strict=True)

    @torch.no_grad()
    def logits(self, prompt: Prompt) -> Tensor:
        """Logits [S, T] at every position of a prompt, over the whole vocabulary."""
        (features_PF,) = self._encode([prompt])
        hidden_SBH = self._model.hidden(_rows_to_batch([prompt], [[]]), features_PF)
        return self._model.language_model.logits_full(hidden_SBH[:, 0])

    def _batch(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        features = self._encode(prompts)
        answers: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))
        for _ in range(self._max_new_tokens):
            chosen = [prompts[r] for r in rows]
            batch = _rows_to_batch(chosen, [answers[r] for r in rows])
            hidden_SBH = self._model.hidden(batch, torch.cat([features[r] for r in rows]))
            last = [len(prompts[r].token_ids) + len(answers[r]) - 1 for r in rows]
            hidden_XH = hidden_SBH[torch.tensor(last), torch.arange(len(rows))]
            best = self._model.language_model.logits_full(hidden_XH).argmax(-1).tolist()
            still = [(r, t) for r, t in zip(rows, best, strict=True) if t != self._eos_id]
            for row, token in still:
                answers[row].append(token)
            rows = [row for row, _ in still]
            if not rows:
                break
        return answers

    def _encode(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Features [P, F] of every prompt's own patches; each view is encoded once."""
        keys = list(dict.fromkeys(key for p in prompts for key in p.images))
        group = self._groups.tp_cp
        first, stop = image_share(len(keys), group.rank(), group.size())
        batch = _rows_to_batch(prompts[:1], [[]])
        batch.num_images, batch.image_share = len(keys), (first, stop)
        batch.pixel_values_ICHW = self._pixels(keys[first:stop])
        features_INF = self._model.encode_images(batch)
        place = {key: i for i, key in enumerate(keys)}
        return [
            features_INF[[place[k] for k in p.images]].flatten(0, 1)[list(p.image_patches)]
            for p in prompts
        ]


def _rows_to_batch(prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> MicroBatch:
    """Prompts with the answers so far as rows, padded on the right; without pixels."""
    rows = [[*p.token_ids, *a] for p, a in zip(prompts, answers, strict=True)]
    length = max(map(len, rows))
    device = select()[0].device
    padded = [row + [0] * (length - len(row)) for row in rows]
    tokens_BS = torch.tensor(padded, dtype=torch.int64, device=device)
    lengths_B = torch.tensor([len(row) for row in rows], dtype=torch.int32, device=device)
    inside_BS = torch.arange(length, device=device) < lengths_B[:, None]
    row_B = torch.arange(len(rows), dtype=torch.int32, device=device)
    positions = [b * length + s for b, p in enumerate(prompts) for s in p.image_positions]
    newlines = [b * length + s for b, p in enumerate(prompts) for s in p.newline_positions]
    none = torch.empty(0, dtype=torch.int64, device=device)
    starts = torch.arange(0, tokens_BS.numel() + 1, length, dtype=torch.int32, device=device)
    return MicroBatch(
        tokens_BS=tokens_BS,
        position_ids_BS=torch.arange(length, device=device).repeat(len(rows), 1),
        text_targets_BS=torch.full_like(tokens_BS, IGNORE),
        document_BS=torch.where(inside_BS, row_B[:, None], -1),
        branch_BS=torch.zeros_like(inside_BS, dtype=torch.int32),
        index_BS=torch.arange(length, device=device).repeat(len(rows), 1),
        cu_seqlens=F.pad(lengths_B.cumsum(0, dtype=torch.int32), (1, 0)),
        cu_seqlens_padded=starts,
        image_positions_P=torch.tensor(positions, dtype=torch.int64, device=device),
        image_patches_P=torch.arange(len(positions), device=device),
        newline_positions=torch.tensor(newlines, dtype=torch.int64, device=device),
        pixel_values_ICHW=None,
        image_share=(0, 0),
        num_images=sum(len(p.images) for p in prompts),
        visual_positions_M=none,
        visual_patches_M=none,
        codes_PD=None,
        sample_ids=[],
    )
