"""One micro-batch: what the data pipeline hands to the model.

Everything that depends on text or layout of a sample is decided in the data pipeline: image
tokens are already expanded to one position per patch, targets are already shifted, and the
attention rule is two integers per position. The model only computes.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORE = -100  # a position of text_targets_BS without a target
NO_POSITION = -1  # a visual target whose position was cut away (loss.mode=official only)


@dataclass(kw_only=True, slots=True)
class MicroBatch:
    """One micro-batch as one rank needs it (identical on the ranks of a tensor-parallel group).

    A row holds one document (a sample) or, packed, several. Attention rule: position i sees j iff
    ``index_BS[j] <= index_BS[i]`` and ``document_BS[i] == document_BS[j]`` and ``branch_BS[j] in
    (0, branch_BS[i])``: branch 0 is the shared prefix, branches 1.. are independent questions that
    cannot see one another.

    Under context parallelism the columns of a row are arranged so that rank r holds the r-th of
    ``context[1]`` equal parts (see ``parallel/context.py``). Whatever attention must know about
    all positions stays whole; tokens and targets are this rank's part; flat positions count its
    own columns: b * (S / context[1]) + column.

    A pipeline stage gets what it uses: ``tokens_BS`` and pixels come to the first, targets and
    codes to the one that computes that loss (pixels too when codes are computed online), None
    elsewhere.

    Attributes:
        tokens_BS: int64 token ids, this rank's columns; image positions hold the image token's id.
        text_targets_BS: int64, this rank's columns; the token to predict, or IGNORE.
        position_ids_BS: int64 rotary positions; they restart per document, and every branch
            continues right after the shared prefix.
        document_BS: int32 document of each position, counted through the micro-batch (an index
            into ``sample_ids``); -1 for padding.
        branch_BS: int32 branch of each position, 0 for the shared prefix.
        index_BS: int64 place of each position in its row before the columns were arranged.
        cu_seqlens: int32 [documents + 1], sum of the documents' lengths up to each, over all rows;
            None where nothing asks for it.
        cu_seqlens_padded: int32, the same with each document's padding (it fills the rows).
        image_positions_P: int64 flat position of every image patch that is in this rank's part.
        image_patches_P: int64 which patch that is: image * N + patch, over all images.
        newline_positions: int64 flat positions, in this rank's part, that hold the learned newline
            vector instead of a token or a patch; None where the model has none.
        pixel_values_ICHW: float32, this rank's share of the images (images
            ``image_share[0]:image_share[1]`` of the micro-batch, all crops of each one after
            another), or None without images.
        features_INF: this rank's share of the encoder's features, in place of pixels, where they
            come from the cache; None otherwise, and without images.
        image_share: first and one-past-last image encoded by this rank, among those of the
            tensor- and context-parallel group of its stage.
        num_images: images of the micro-batch, on all ranks together; where a picture is cut into
            tiles, each of its views is an image here.
        visual_positions_M: int64 flat position of each position that predicts a patch's codes
            (``target_shift`` is already applied), in this rank's part; NO_POSITION for a zero
            hidden vector.
        visual_patches_M: int64 patch whose codes are predicted there: image * N + patch.
        visual_scale: what a sum over these positions is multiplied by to stand for all (1 / share
            where only some were drawn, see data/subsample.py).
        visual_left_out: positions of this rank that would predict a patch but were not drawn.
        codes_PD: int64 codes of every patch of all images from the cache, or None when the
            tokenizer is online.
        sample_ids: each document's sample, for messages.
        image_keys: content key of every image.
        digest: sum of hashes of the documents' contents and places in the global batch; summed over
            all micro-batches of a step it names the global batch, however that was split.
        context: this rank's place among those that share the sequences, and their number.
        text_positions_X: int64 flat position of each text target, found where the batch is made: on
            a GPU the host would wait for their number.
        document_lengths_Bn: int64, of ``host_lengths``, on the host also where the rest is on a
            GPU; None where nobody asked before.
    """

    tokens_BS: Tensor | None
    text_targets_BS: Tensor | None
    position_ids_BS: Tensor
    document_BS: Tensor
    branch_BS: Tensor
    index_BS: Tensor
    cu_seqlens: Tensor | None = None
    cu_seqlens_padded: Tensor | None = None
    image_positions_P: Tensor
    image_patches_P: Tensor
    pixel_values_ICHW: Tensor | None
    image_share: tuple[int, int]
    num_images: int
    visual_positions_M: Tensor
    visual_patches_M: Tensor
    codes_PD: Tensor | None
    sample_ids: list[str]
    image_keys: list[str] = field(default_factory=list)
    digest: int = 0
    newline_positions: Tensor | None = None
    features_INF: Tensor | None = None
    visual_scale: float = 1.0
    visual_left_out: int = 0
    context: tuple[int, int] = (0, 1)
    text_positions_X: Tensor | None = field(init=False)
    document_lengths_Bn: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.text_positions_X = None
        if self.text_targets_BS is not None:
            self.text_positions_X = (self.text_targets_BS.flatten() != IGNORE).nonzero().squeeze(1)

    def host_lengths(self) -> Tensor:
        """Lengths of documents, padding like one more, int64 [B, n] with zeros at the end.

        They add up to the columns of a row. Empty, [0], where lengths do not say who sees whom:
        with branches, or where a rank has some of the columns only.
        """
        if self.context[1] > 1 or self.branch_BS.any():
            return torch.empty(0, dtype=torch.int64)
        runs = [_runs(row) for row in self.document_BS]
        return torch.nn.utils.rnn.pad_sequence(runs, batch_first=True)

    def own(self, x_BS: Tensor) -> Tensor:
        """This rank's columns of something that is given for all positions."""
        rank, ways = self.context
        size = x_BS.shape[1] // ways
        return x_BS[:, rank * size : (rank + 1) * size]

    @property
    def num_text_targets(self) -> int:
        """Positions of this rank with a text target; 0 on a stage that gets no targets."""
        return 0 if self.text_positions_X is None else self.text_positions_X.numel()

    @property
    def num_visual_targets(self) -> int:
        """Positions of this rank with a visual target, whether they were drawn or not."""
        return self.visual_positions_M.numel() + self.visual_left_out


def _runs(row_S: Tensor) -> Tensor:
    """How often each number follows itself."""
    return torch.unique_consecutive(row_S, return_counts=True)[1]


def image_share(num_images: int, rank: int, world: int) -> tuple[int, int]:
    """First and one-past-last image that ``rank`` of ``world`` encodes (contiguous, balanced)."""
    return num_images * rank // world, num_images * (rank + 1) // world
