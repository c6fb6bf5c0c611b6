"""How positions are divided under context and sequence parallelism: arithmetic only.

Causal attention costs a late position more than an early one. So every document is cut into 2 * cp
equal chunks, and rank r holds the r-th from the front and the r-th from the back: all ranks hold
equally many positions of each document and do equal work on it. Documents are padded until that
is possible.
"""

from collections.abc import Sequence

import numpy as np

from megatron_asvr.errors import AsvrError


def document_multiple(*, tp: int, cp: int, sp: bool) -> int:
    """What the padded length of every document is a multiple of."""
    return 1 if cp == 1 else 2 * cp * (tp if sp else 1)


def row_multiple(*, tp: int, cp: int, sp: bool) -> int:
    """What the length of every row is a multiple of; sequence parallelism splits rows, too."""
    return max(document_multiple(tp=tp, cp=cp, sp=sp), tp if sp else 1)


def padded_lengths(lengths: Sequence[int], multiple: int) -> list[int]:
    """The lengths, each rounded up to a multiple."""
    return [-(-length // multiple) * multiple for length in lengths]


def partition(cu_seqlens_padded: np.ndarray, total: int, cp: int, rank: int) -> np.ndarray:
    """The positions that one of ``cp`` ranks holds, int32 [total / cp], in its order.

    Args:
        cu_seqlens_padded: [documents + 1] where each document starts, and where the last one ends.
        total: number of positions, that end.
        cp: ranks that share the positions.
        rank: one of them.

    Raises:
        AsvrError: a document's padded length does not divide, or the ends do not match.

    Source: Transformer Engine's ``thd_get_partitioned_indices``.
    """
    starts = np.asarray(cu_seqlens_padded, dtype=np.int64)
    if starts[-1] != total or (cp > 1 and (starts % (2 * cp)).any()):
        raise AsvrError(
            f"documents that start at {starts[:-1].tolist()} and end at {starts[-1]} cannot be "
            f"shared by {cp} ranks in {total} positions; pad each to a multiple of {2 * cp}"
        )
    own = starts // cp  # where this rank's parts of the documents start
    place = np.arange(total // cp)
    document = np.searchsorted(own, place, side="right") - 1
    half = np.diff(own)[document] // 2
    inside = place - own[document]
    chunks_before = np.where(inside < half, rank, 2 * (cp - 1) - rank)
    return (starts[document] + half * chunks_before + inside).astype(np.int32)
