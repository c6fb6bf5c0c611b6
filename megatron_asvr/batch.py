"""One micro-batch: what the data pipeline hands to the model.

Everything that depends on text or layout of a sample is decided in the data pipeline: image
tokens are already expanded to one position per patch, targets are already shifted, and the
attention rule is two integers per position. The model only computes.
"""

from dataclasses import dataclass

from torch import Tensor

IGNORE = -100  # a position of text_targets_BS without a target
NO_POSITION = -1  # a visual target whose position was cut away (loss.mode=official only)


@dataclass(kw_only=True, slots=True)
class MicroBatch:
    """One micro-batch of one data-parallel rank (identical on all its tensor-parallel ranks).

    Attention rule: position i sees j iff ``j <= i`` and ``document_BS[i] == document_BS[j]`` and
    ``branch_BS[j] in (0, branch_BS[i])``: branch 0 is the shared prefix, branches 1.. are
    independent questions that cannot see one another. Padding has document -1.

    Attributes:
        tokens_BS: int64 token ids; image positions hold the image token's id.
        position_ids_BS: int64 rotary positions; they restart per document, and every branch
            continues right after the shared prefix.
        text_targets_BS: int64; the token that position s must predict, or IGNORE.
        document_BS: int32 document of each position, -1 for padding.
        branch_BS: int32 branch of each position, 0 for the shared prefix.
        image_positions_P: int64 flat index (b * S + s) of every image patch in the sequence, image
            by image, patch by patch (P = num_images * N), NO_POSITION for a patch that was cut.
        pixel_values_ICHW: float32, this rank's share of the images (images
            ``image_share[0]:image_share[1]`` of the micro-batch), or None without images.
        image_share: first and one-past-last image encoded by this rank.
        num_images: images of the micro-batch, on all ranks together.
        visual_positions_M: int64 flat index of each position that predicts a patch's codes
            (``target_shift`` is already applied), NO_POSITION for a zero hidden vector.
        visual_patches_M: int64 index into the P patches whose codes are predicted there.
        codes_PD: int64 codes of every patch from the cache, or None when the tokenizer is online.
        sample_ids: the samples' ids, for error messages.
    """

    tokens_BS: Tensor
    position_ids_BS: Tensor
    text_targets_BS: Tensor
    document_BS: Tensor
    branch_BS: Tensor
    image_positions_P: Tensor
    pixel_values_ICHW: Tensor | None
    image_share: tuple[int, int]
    num_images: int
    visual_positions_M: Tensor
    visual_patches_M: Tensor
    codes_PD: Tensor | None
    sample_ids: list[str]

    @property
    def num_text_targets(self) -> int:
        """Positions with a text target."""
        return int((self.text_targets_BS != IGNORE).sum())

    @property
    def num_visual_targets(self) -> int:
        """Positions with a visual target."""
        return self.visual_positions_M.numel()


def image_share(num_images: int, rank: int, world: int) -> tuple[int, int]:
    """First and one-past-last image that ``rank`` of ``world`` encodes (contiguous, balanced)."""
    return num_images * rank // world, num_images * (rank + 1) // world
