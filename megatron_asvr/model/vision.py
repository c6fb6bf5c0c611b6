"""The SigLIP / SigLIP2 vision encoder in plain torch, numerically the one of transformers.

Every rank holds the whole encoder: a tensor-parallel group splits the images, not the weights.
The forward pass stops at the selected hidden state. The layers above it and the final norm exist
only until the weights of a run are loaded and stored, so that a Hugging Face folder goes in and out
without loss; then they are left out (``leave_out_unused``).
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_asvr.config.schema import ResolutionConfig, VisionConfig
from megatron_asvr.shapes import check_shape

NUM_CHANNELS = 3  # red, green, blue
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


class SiglipEmbeddings(nn.Module):
    """Patches to vectors: a strided convolution plus learned positions, no class token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(
            NUM_CHANNELS,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
        )
        self.position_embedding = nn.Embedding(config.num_patches, config.hidden_size)

    def forward(self, pixels_ICHW: Tensor) -> Tensor:
        """Patch embeddings [I, N, F]."""
        patches_IFN = self.patch_embedding(pixels_ICHW).flatten(2)
        return patches_IFN.transpose(1, 2) + self.position_embedding.weight


class SiglipAttention(nn.Module):
    """Bidirectional attention among the patches of one image."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_INF: Tensor) -> Tensor:
        """Attended vectors [I, N, F]."""
        query, key, value = (
            projection(x_INF).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class SiglipMLP(nn.Module):
    """Two linear layers around the tanh approximation of GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_hidden_size)
        self.fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x_INF: Tensor) -> Tensor:
        """Transformed vectors [I, N, F]."""
        return self.fc2(F.gelu(self.fc1(x_INF), approximate="tanh"))


class SiglipLayer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x_INF: Tensor) -> Tensor:
        """The layer's output [I, N, F]."""
        x_INF = x_INF + self.self_attn(self.layer_norm1(x_INF))
        return x_INF + self.mlp(self.layer_norm2(x_INF))


class SiglipStack(nn.Module):
    """The layers, under the name that Hugging Face gives them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SiglipLayer(config) for _ in range(config.num_layers))

    def forward(self, x_INF: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        """The states [I, N, F] after so many layers each."""
        found = {0: x_INF}
        for number, layer in enumerate(self.layers[: max(numbers)], 1):
            x_INF = layer(x_INF)
            if number in numbers:
                found[number] = x_INF
        return [found[number] for number in numbers]


def join_scales(features_CNF: Tensor, resolution: ResolutionConfig, grid: int) -> Tensor:
    """Features [I, N, scales * F] of images from those of the crops of all their scales.

    The crops of a scale make one large grid of patches again, which is averaged down to the first
    scale's; the scales stand one after another in a feature.

    Args:
        features_CNF: of the crops, image by image, scale by scale, row by row.
        resolution: the scales.
        grid: patches along one side of a crop.

    Source: S2 (arXiv 2403.13043), with area interpolation.
    """
    if resolution.num_scales == 1:
        return features_CNF
    crops, width = resolution.num_crops, features_CNF.shape[-1]
    features = features_CNF.reshape(len(features_CNF) // crops, crops, grid, grid, width)
    joined, start = [], 0
    for scale in resolution.scales:
        own = features[:, start : start + scale**2].unflatten(1, (scale, scale))
        large = own.transpose(2, 3).reshape(-1, grid, scale, grid, scale, width)
        joined.append(large.float().mean((2, 4)).flatten(1, 2).to(features.dtype))
        start += scale**2
    return torch.cat(joined, dim=-1)


class SiglipEncoder(nn.Module):
    """Images to one feature per patch: ``hidden_states[feature_layer]`` of Hugging Face.

    Parameter names are those of ``SiglipVisionTransformer`` without its pooling head.

    Args:
        config: sizes, and the hidden state to stop at.

    Attributes:
        is_graphed: a CUDA graph runs the layers; see ``graph``.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.is_graphed = False
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = SiglipStack(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, in which the forward pass computes."""
        return self.embeddings.patch_embedding.weight.dtype

    @property
    def attention(self) -> str:
        """Name of the attention kernel."""
        return "torch scaled_dot_product_attention"

    def forward(self, pixels_ICHW: Tensor) -> Tensor:
        """Features [I, N, F] in the type of the weights.

        Args:
            pixels_ICHW: normalised pixels, any floating type; I may be 0.

        Raises:
            AsvrError: the pixels are not images of ``config.image_size``.
        """
        return self.hidden_states(pixels_ICHW, [self.config.num_feature_layers])[0]

    def hidden_states(self, pixels_ICHW: Tensor, numbers: Sequence[int]) -> list[Tensor]:
        """The states [I, N, F] after so many layers each, from one pass.

        Args:
            pixels_ICHW: as of ``forward``.
            numbers: of layers, 0 for the patch embeddings.

        Raises:
            AsvrError: the pixels are not images of ``config.image_size``.
        """
        side = self.config.image_size
        check_shape("pixels_ICHW", pixels_ICHW, "I C H W", C=NUM_CHANNELS, H=side, W=side)
        x_INF = self.embeddings(pixels_ICHW.to(self.dtype))
        found = self.encoder(x_INF, numbers)
        # A graph writes to the same memory every time, and a backward pass may read it later.
        return [x.clone() for x in found] if self.is_graphed else found

    def graph(self) -> None:
        """Let torch record the layers as CUDA graphs, one for each number of images that it meets.

        All layers together: each call of something compiled takes the memory of the one before.
        Without a compiler nothing is recorded.
        """
        self.encoder.compile(mode="reduce-overhead")
        self.is_graphed = True

    def fingerprint(self) -> str:
        """sha256 over everything that decides a feature: sizes, and the weights that are read."""
        number = self.config.num_feature_layers
        sizes = dataclasses.replace(self.config, num_layers=number, feature_layer=-1, init_std=0.0)
        digest = hashlib.sha256(repr(sizes).encode())
        for name, parameter in sorted(self.named_parameters()):
            if self.reads(name, number):
                numbers = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
                digest.update(f"{name} {parameter.dtype}".encode())
                digest.update(numbers.data)
        return digest.hexdigest()

    @staticmethod
    def reads(name: str, num_layers: int) -> bool:
        """Whether a pass through the first ``num_layers`` layers reads the parameter ``name``."""
        layer = _LAYER.match(name)
        return name.startswith("embeddings.") or (bool(layer) and int(layer[1]) < num_layers)

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters that the forward pass never reads: those above the selected hidden state."""
        number = self.config.num_feature_layers
        return [x for name, x in self.named_parameters() if not self.reads(name, number)]

    def leave_out_unused(self) -> int:
        """Number of parameters that are given up: those that the forward pass never reads."""
        number = sum(x.numel() for x in self.unused_parameters())
        self.encoder.layers = self.encoder.layers[: self.config.num_feature_layers]
        self.post_layernorm = nn.Identity()
        return number
