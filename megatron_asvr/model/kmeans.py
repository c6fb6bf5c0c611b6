"""Residual k-means over blocks of vectors: the same codebooks from any number of ranks.

Level q is fitted on what levels 0..q-1 leave. First codewords, and later those that attract no
vector, are vectors drawn with a probability in proportion to their error, so duplicated vectors
(plain background) neither crowd the first codewords nor keep later ones dead.

Vectors come in numbered blocks, whole blocks to a rank, and nothing depends on who has which:
- a block is searched as one piece, because matrix products may round by their shape;
- sums are of integers (fixed point, finer than fp32), where the order of summands changes nothing;
- random numbers are drawn for each block from the seed, the level, the round and its number.
What can still differ is what one device or number of CPU threads computes for one block. A journal
keeps each level after every iteration, so that an interrupted fit ends like an undisturbed one.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_asvr.errors import ConfigError
from megatron_asvr.model.quantize import nearest_codes
from megatron_asvr.parallel.collectives import (
    all_reduce_max,
    gather_objects,
    on_first,
    sum_in_place,
)

SUM_BITS = 62  # of a fixed-point sum, its sign apart
ROWS = 8192  # vectors converted to fixed point at a time


class Journal(Protocol):
    """Keeps the codebook of each level; the group's first rank is asked."""

    def load(self, level: int) -> tuple[int, Tensor] | None:
        """Iterations done and codewords on the CPU, or None before the first codewords."""

    def save(self, level: int, iterations: int, codebook_KC: Tensor) -> None:
        """Keep them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Level:
    """One level's vectors on this rank, and how ranks work together."""

    blocks: Mapping[int, Tensor]
    group: ProcessGroup | None
    seed: str


def fit_codebooks(
    blocks: Mapping[int, Tensor],
    sizes: Sequence[int],
    *,
    seed: int,
    iters: int = 10,
    group: ProcessGroup | None = None,
    journal: Journal | None = None,
) -> list[Tensor]:
    """Codebooks fitted by residual k-means, one fp32 [K_d, C] tensor per level, on every rank.

    Args:
        blocks: this rank's fp32 vectors [R, C] by the number of their block, at least one, which
            may be empty; they are overwritten.
        sizes: number of codewords of each level.
        seed: makes the result repeatable.
        iters: k-means iterations of each level.
        group: ranks that hold different blocks, or None.
        journal: what was reached before, and is to be kept now.

    Raises:
        ConfigError: a codebook is larger than the number of vectors of all ranks, or vectors are
            not finite.
    """
    some = next(iter(blocks.values()))
    held = torch.tensor(sum(map(len, blocks.values())), device=some.device)
    sum_in_place([held], group=group)
    if held < max(sizes):
        raise ConfigError(
            f"codebook_sizes={list(sizes)} of the visual tokenizer, but only {int(held)} vectors "
            "to fit them; give more images or smaller codebooks"
        )
    codebooks = []
    for number, size in enumerate(sizes):
        level = _Level(blocks=blocks, group=group, seed=f"{seed} {number}")
        done, codebook_KC = -1, some[:0]
        if journal is not None:
            found = on_first(lambda at=number: journal.load(at), group=group)
            if found is not None:
                done, codebook_KC = found[0], found[1].to(some.device)
        for iteration in range(done + 1, iters + 1):
            if iteration == 0:
                codebook_KC = _first_codewords(level, size)
            else:
                codebook_KC = _lloyd_step(level, codebook_KC, iteration)
            if journal is not None:
                _save(journal, number, iteration, codebook_KC, group)
        for rows_RC in blocks.values():
            rows_RC -= codebook_KC[nearest_codes(rows_RC, codebook_KC)]
        codebooks.append(codebook_KC)
    return codebooks


def _save(
    journal: Journal, number: int, iteration: int, codebook_KC: Tensor, group: ProcessGroup | None
) -> None:
    on_first(lambda: journal.save(number, iteration, codebook_KC.cpu()), group=group)


def _first_codewords(level: _Level, size: int) -> Tensor:
    """Codewords to start from: vectors drawn by error, in rounds that double their number.

    Source: k-means++, with its one vector a round replaced by as many as there are already.
    """
    weights = {number: torch.ones(len(rows)) for number, rows in level.blocks.items()}
    codebook_KC = next(iter(level.blocks.values()))[:0]
    while len(codebook_KC) < size:
        count = min(max(1, len(codebook_KC)), size - len(codebook_KC))
        fresh_KC = _draw(level, weights, count, turn=f"first {len(codebook_KC)}")
        codebook_KC = torch.cat([codebook_KC, fresh_KC])
        weights = {
            number: _errors(rows, codebook_KC, nearest_codes(rows, codebook_KC))
            for number, rows in level.blocks.items()
        }
    return codebook_KC


def _errors(rows_RC: Tensor, codebook_KC: Tensor, codes_R: Tensor) -> Tensor:
    """Squared distance of every row to its codeword, on the CPU: [R]."""
    parts = zip(rows_RC.split(ROWS), codes_R.split(ROWS), strict=True)
    return torch.cat([(rows - codebook_KC[codes]).square().sum(1).cpu() for rows, codes in parts])


def _lloyd_step(level: _Level, codebook_KC: Tensor, iteration: int) -> Tensor:
    """Codewords moved to the mean of the vectors nearest to them, the dead ones restarted."""
    codes = {number: nearest_codes(rows, codebook_KC) for number, rows in level.blocks.items()}
    sums_KC, counts_K = _exact_sums(level, codes, codebook_KC)
    moved_KC = (sums_KC / counts_K.clamp(min=1)[:, None]).float()
    dead = (counts_K == 0).nonzero().squeeze(1)
    if len(dead):  # the same on every rank: the counts were summed
        weights = {
            number: _errors(rows, codebook_KC, codes[number])
            for number, rows in level.blocks.items()
        }
        moved_KC[dead] = _draw(level, weights, len(dead), turn=f"dead {iteration}")
    return moved_KC


def _exact_sums(
    level: _Level, codes: Mapping[int, Tensor], codebook_KC: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums of the vectors of each code, fp64 [K, C], and their number, int64 [K], of all ranks."""
    some = codebook_KC
    largest = torch.zeros((), device=some.device)
    for rows_RC in level.blocks.values():
        if rows_RC.numel():
            largest = torch.maximum(largest, rows_RC.abs().max())
    total = torch.tensor(sum(map(len, level.blocks.values())), device=some.device)
    sum_in_place([total], group=level.group)
    largest = all_reduce_max(largest, group=level.group)
    if not bool(largest.isfinite()):
        raise ConfigError(
            "features of the visual tokenizer's encoder are not finite; are its weights damaged?"
        )
    # |x| < 2^a and R < 2^b: sums of round(x * 2^scale) stay below 2^SUM_BITS.
    scale = SUM_BITS - math.frexp(float(largest))[1] - int(total).bit_length()
    sums_KC = torch.zeros(some.shape, dtype=torch.int64, device=some.device)
    counts_K = torch.zeros(len(some), dtype=torch.int64, device=some.device)
    for number, block_RC in level.blocks.items():
        counts_K += torch.bincount(codes[number], minlength=len(some))
        parts = zip(block_RC.split(ROWS), codes[number].split(ROWS), strict=True)
        for rows_RC, codes_R in parts:
            sums_KC.index_add_(0, codes_R, (rows_RC.double() * 2.0**scale).round().long())
    sum_in_place([sums_KC], group=level.group)
    sum_in_place([counts_K], group=level.group)
    return sums_KC.double() * 2.0**-scale, counts_K


def _draw(level: _Level, weights: Mapping[int, Tensor], count: int, *, turn: str) -> Tensor:
    """``count`` rows of those of all ranks, drawn by weight without return: [count, C].

    Source: the exponential-keys form of Efraimidis and Spirakis' weighted reservoir sampling,
    which needs no more than each rank's own best rows.
    """
    keys, places = [], []  # a place: number of the block, row in it
    for number in sorted(weights):
        generator = _noise(level, turn, number)
        noise_R = torch.empty(len(weights[number])).exponential_(generator=generator)
        keys.append((weights[number] / noise_R.clamp(min=1e-30)).numpy())
        places.append(np.stack([np.full(len(noise_R), number), np.arange(len(noise_R))], 1))
    best = _best(np.concatenate(keys), np.concatenate(places), count)
    shares = gather_objects(best, group=level.group)
    _, chosen = _best(*(np.concatenate(column) for column in zip(*shares, strict=True)), count)
    some = next(iter(level.blocks.values()))
    drawn_KC = some.new_zeros(count, some.shape[1])
    for place, (number, row) in enumerate(chosen.tolist()):
        if number in level.blocks:
            drawn_KC[place] = level.blocks[number][row]
    sum_in_place([drawn_KC], group=level.group)
    return drawn_KC + 0.0  # no -0.0, which sums over several ranks do not have


def _best(keys: np.ndarray, places: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` largest keys and their places; of equal keys the first place."""
    order = np.lexsort((places[:, 1], places[:, 0], -keys))[:count]
    return keys[order], places[order]


def _noise(level: _Level, turn: str, number: int) -> torch.Generator:
    digest = hashlib.sha256(f"{level.seed} {turn} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
