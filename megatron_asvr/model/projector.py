"""From encoder features to the language model's width, and the vector that ends a row of them."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_asvr.batch import MicroBatch
from megatron_asvr.config.schema import ModelConfig
from megatron_asvr.model.layers import MLP, normal


class Projector(MLP):
    """LLaVA's ``mlp2x_gelu``: linear F -> H, exact GELU, linear H -> H.

    Args:
        config: gives the encoder's and the language model's width.
        tp: tensor-parallel group, or None.
        dtype: of the parameters.

    Attributes:
        image_newline: [H], what ends every row of a grid's patches; None without newlines.
    """

    def __init__(self, config: ModelConfig, *, tp: ProcessGroup | None, dtype: torch.dtype) -> None:
        super().__init__(
            "model.language.hidden_size",
            config.vision.hidden_size * config.resolution.num_scales,
            config.language.hidden_size,
            tp=tp,
            dtype=dtype,
            std=config.language.init_std,
        )
        width, std = config.language.hidden_size, config.language.init_std
        self.image_newline: nn.Parameter | None = None
        if config.resolution.newline:
            self.image_newline = normal(width, dtype=dtype, std=std)

    def with_newlines(self, embeds_PH: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """What images put into the sequence: embeddings of patches, then of newlines; and where.

        Args:
            embeds_PH: projected features of this rank's patches.
            batch: tells the positions.
        """
        if self.image_newline is None:
            return embeds_PH, batch.image_positions_P
        newlines = batch.newline_positions
        assert newlines is not None  # the data of a model with newlines has them
        newlines_QH = self.image_newline.expand(len(newlines), -1)
        places = torch.cat([batch.image_positions_P, newlines])
        return torch.cat([embeds_PH, newlines_QH]), places
