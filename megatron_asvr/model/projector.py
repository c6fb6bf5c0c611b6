"""From encoder features to the language model's width."""

import torch
from torch.distributed import ProcessGroup

from megatron_asvr.config.schema import ModelConfig
from megatron_asvr.model.layers import MLP


class Projector(MLP):
    """LLaVA's ``mlp2x_gelu``: linear F -> H, exact GELU, linear H -> H.

    Args:
        config: gives the encoder's and the language model's width.
        tp: tensor-parallel group, or None.
        dtype: of the parameters.
    """

    def __init__(self, config: ModelConfig, *, tp: ProcessGroup | None, dtype: torch.dtype) -> None:
        super().__init__(
            "model.language.hidden_size",
            config.vision.hidden_size,
            config.language.hidden_size,
            tp=tp,
            dtype=dtype,
            std=config.language.init_std,
        )
