"""Image features into the sequence, hidden states out of it.

Positions of a micro-batch are flat indices b * S + s; activations are sequence first, [S, B, H].
Under context parallelism all of this is about a rank's own columns. NO_POSITION occurs only under
``loss.mode=official``, where a truncated image keeps its targets but has lost its place.
"""

from torch import Tensor

from megatron_asvr.batch import NO_POSITION


def splice_images(embeds_SBH: Tensor, image_embeds_PH: Tensor, positions_P: Tensor) -> Tensor:
    """Embeddings [S, B, H] in which the image positions hold the projected features.

    Args:
        embeds_SBH: token embeddings.
        image_embeds_PH: projected features, patch by patch; P may be 0.
        positions_P: int64 flat position of every patch.
    """
    spliced = embeds_SBH.flatten(0, 1).index_copy(
        0, _rows(positions_P, embeds_SBH), image_embeds_PH.to(embeds_SBH.dtype)
    )
    return spliced.view_as(embeds_SBH)


def take_positions(hidden_SBH: Tensor, positions_M: Tensor, *, may_be_cut: bool) -> Tensor:
    """Hidden states at the positions, [M, H]; a zero vector for NO_POSITION.

    Args:
        hidden_SBH: hidden states.
        positions_M: int64 flat positions; M may be 0.
        may_be_cut: some positions may be NO_POSITION.
    """
    if not may_be_cut:
        return hidden_SBH.flatten(0, 1).index_select(0, _rows(positions_M, hidden_SBH))
    cut_M = positions_M == NO_POSITION
    rows_M = _rows(positions_M.masked_fill(cut_M, 0), hidden_SBH)
    return hidden_SBH.flatten(0, 1).index_select(0, rows_M).masked_fill(cut_M[:, None], 0)


def _rows(positions: Tensor, x_SBH: Tensor) -> Tensor:
    """Row of the flattened [S * B, H] for each flat position b * S + s."""
    num_positions, num_samples, _ = x_SBH.shape
    if num_samples == 1:
        return positions
    return positions % num_positions * num_samples + positions // num_positions
