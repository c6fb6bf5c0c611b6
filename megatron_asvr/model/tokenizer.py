"""The frozen visual tokenizer: an image becomes [N, D] codes, D residual levels per patch.

Two kinds share all of it and differ in what is quantised: *semantic* codes come from a late
layer of a vision encoder (the tokenizer's own copy, whatever the model's encoder is or becomes);
*appearance* codes, the ablation, come from a shallow layer or from the pixels of the patch. The
codes are targets only; nothing of the tokenizer is used when a trained model answers.

A tokenizer is a folder: ``config.json`` (what it is, and a fingerprint over that and the
weights) beside ``tokenizer.safetensors``.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_asvr.config.schema import VisionConfig
from megatron_asvr.errors import CheckpointError, ConfigError
from megatron_asvr.model.kmeans import fit_codebooks
from megatron_asvr.model.quantize import Codebooks, residual_codes
from megatron_asvr.model.vision import NUM_CHANNELS, SiglipEncoder
from megatron_asvr.parallel.collectives import on_first
from megatron_asvr.parallel.stored import Stored, open_safetensors, read_shared

FORMAT = 1  # of the folder
CODES_VERSION = 1  # raised when the same weights and pixels give other codes than before
MAX_CODEWORDS = 2**22  # of all levels; the paper has 2**17
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "tokenizer.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """What is quantised, and into how many codes.

    Attributes:
        kind: semantic (a late layer) or appearance (a shallow layer, or pixels).
        vision: the encoder, whose image and patch size also cut images into pixel patches.
        feature_layer: hidden state that is quantised (-2: the last layer but one); None: pixels.
        codebook_sizes: codewords of each level.
    """

    kind: Literal["semantic", "appearance"]
    vision: VisionConfig
    feature_layer: int | None
    codebook_sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind == "semantic" and self.feature_layer is None:
            raise ConfigError(
                "a semantic tokenizer needs the feature_layer of an encoder; pixels (None) are "
                "possible with kind=appearance"
            )
        layer, num_layers = self.feature_layer, self.vision.num_layers
        if layer is not None and not -num_layers - 1 <= layer <= num_layers:
            raise ConfigError(
                f"feature_layer={layer} does not exist in an encoder of {num_layers} layers; its "
                f"hidden states are {-num_layers - 1} to {num_layers}"
            )
        depth = None if layer is None else layer + (num_layers + 1 if layer < 0 else 0)
        if self.kind == "appearance" and depth is not None and depth > num_layers // 2:
            raise ConfigError(
                f"kind=appearance quantises pixels or a shallow layer, but feature_layer={layer} "
                f"comes after {depth} of {num_layers} layers; use pixels, or 0 to {num_layers // 2}"
            )
        if not self.codebook_sizes or min(self.codebook_sizes) < 2:
            raise ConfigError(
                f"codebook_sizes={list(self.codebook_sizes)}; give at least one level, each with "
                "two codewords or more"
            )
        if (total := sum(self.codebook_sizes)) > MAX_CODEWORDS:
            raise ConfigError(
                f"{len(self.codebook_sizes)} levels with {total} codewords together; at most "
                f"{MAX_CODEWORDS} can be"
            )

    @property
    def width(self) -> int:
        """Width of a feature, and so of a codeword."""
        if self.feature_layer is None:
            return NUM_CHANNELS * self.vision.patch_size**2
        return self.vision.hidden_size


class VisualTokenizer(nn.Module):
    """Images to codes, always in eval mode and without gradients.

    A new tokenizer has a random encoder and zero codebooks: load the encoder's weights, then
    ``fit``. ``load`` gives a finished one.

    Args:
        config: what is quantised, and into how many codes.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder: SiglipEncoder | None = None
        if config.feature_layer is not None:
            vision = dataclasses.replace(config.vision, feature_layer=config.feature_layer)
            self.encoder = SiglipEncoder(vision)
        empty = [torch.zeros(size, config.width) for size in config.codebook_sizes]
        self.codebooks = Codebooks(empty, persistent=True)
        self._fingerprint: str | None = None
        self.requires_grad_(False).eval()

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codewords of each level."""
        return self.config.codebook_sizes

    @property
    def depth(self) -> int:
        """Number of levels."""
        return len(self.config.codebook_sizes)

    @property
    def width(self) -> int:
        """Width of a codeword."""
        return self.config.width

    @property
    def fingerprint(self) -> str:
        """sha256 over configuration and weights: codes of equal fingerprints are equal."""
        if self._fingerprint is None:
            self._fingerprint = _fingerprint(self.config, self.state_dict())
        return self._fingerprint

    def facts(self, device: str) -> dict[str, Any]:
        """Everything beside the pixels that decides the codes, by name.

        Args:
            device: type of the device that encodes.
        """
        encoder = self.encoder
        return {
            "codes version": CODES_VERSION,
            "encoder dtype": None if encoder is None else str(encoder.dtype).split(".")[1],
            "matmul precision": torch.get_float32_matmul_precision(),
            "attention": None if encoder is None else f"{encoder.attention} on {device}",
            "tokenizer": self.fingerprint,
        }

    @torch.no_grad()
    def features(self, pixels_ICHW: Tensor) -> Tensor:
        """The fp32 vectors that are quantised: [I, N, C].

        Args:
            pixels_ICHW: normalised pixels.
        """
        if self.encoder is not None:
            return self.encoder(pixels_ICHW).float()
        patch = self.config.vision.patch_size
        return F.unfold(pixels_ICHW.float(), patch, stride=patch).transpose(1, 2)

    @torch.no_grad()
    def encode(self, pixels_ICHW: Tensor) -> Tensor:
        """Codes of every patch and level: int64 [I, N, D].

        Args:
            pixels_ICHW: normalised pixels; I may be 0.
        """
        return self.quantise(self.features(pixels_ICHW))

    @torch.no_grad()
    def quantise(self, features_INC: Tensor) -> Tensor:
        """Codes of every patch and level: int64 [I, N, D].

        Args:
            features_INC: as ``features`` gives them.
        """
        codes_RD = residual_codes(features_INC.flatten(0, 1), self.codebooks.tables())
        return codes_RD.unflatten(0, features_INC.shape[:2])

    def leave_out_unused(self) -> int:
        """Number of parameters given up: those that ``encode`` never reads. Nothing saves it then.

        The fingerprint stays that of all.
        """
        self._fingerprint = self.fingerprint
        return 0 if self.encoder is None else self.encoder.leave_out_unused()

    def fit(self, features: Iterable[Tensor], *, seed: int, iters: int = 10) -> None:
        """Fit the codebooks in place to all of some features (train/fit.py fits to a sample).

        Args:
            features: batches of vectors [..., C]; at least one.
            seed: makes the result repeatable.
            iters: k-means iterations of each level.
        """
        blocks = {n: x.reshape(-1, self.width).float().clone() for n, x in enumerate(features)}
        self.set_codebooks(fit_codebooks(blocks, self.codebook_sizes, seed=seed, iters=iters))

    def set_codebooks(self, tables: Sequence[Tensor]) -> None:
        """Replace the codebooks by ``tables``, one [K_d, C] per level."""
        for own, table in zip(self.codebooks.tables(), tables, strict=True):
            own.copy_(table)
        self._fingerprint = None

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch; the fingerprint is computed anew."""
        self._fingerprint = None
        return super().load_state_dict(*args, **kwargs)

    def check_fits(self, vision: VisionConfig) -> None:
        """Return when the tokenizer cuts images as the model's encoder does.

        Raises:
            ConfigError: the patch grids differ, or the image sizes (both read the same pixels).
        """
        own = self.config.vision
        if own.grid == vision.grid and own.image_size == vision.image_size:
            return
        raise ConfigError(
            f"model.visual_tokenizer has {_grid(own)}, but model.vision has {_grid(vision)}; both "
            "read the same pixels, and every patch needs its own codes: fit a tokenizer at the "
            "encoder's size, or change model.vision"
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Write the tokenizer's folder; the configuration, written last, seals it."""
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        state = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        document = {**_describe(self.config), "fingerprint": self.fingerprint}
        unfinished = path / f"{WEIGHTS_FILE}.part"
        save_file(state, unfinished)
        unfinished.replace(path / WEIGHTS_FILE)
        unfinished = path / f"{CONFIG_FILE}.part"
        unfinished.write_text(json.dumps(document, indent=2) + "\n")
        unfinished.replace(path / CONFIG_FILE)

    @staticmethod
    def describe(folder: str | os.PathLike) -> TokenizerConfig:
        """What the tokenizer saved in ``folder`` quantises, without reading its weights.

        Raises:
            CheckpointError: the description is missing or damaged.
        """
        return _read_config(pathlib.Path(folder))[0]

    @classmethod
    def load(
        cls, folder: str | os.PathLike, *, group: dist.ProcessGroup | None = None
    ) -> "VisualTokenizer":
        """The tokenizer saved in ``folder``, on the CPU, after checking its fingerprint.

        Args:
            folder: of the tokenizer.
            group: ranks that all want it, of which one reads it; None: this process alone.

        Raises:
            CheckpointError: a file is missing, damaged, or not of this fingerprint.
        """
        path = pathlib.Path(folder)
        config, wanted, stored = on_first(functools.partial(_open, path), group=group)
        tokenizer = cls(config)
        state = {name: x.cpu().clone() for name, x in read_shared(stored, stored, group=group)}
        got = _fingerprint(config, state)
        if got != wanted:
            raise CheckpointError(
                f"visual tokenizer {path}: its fingerprint is {got[:16]}, but {CONFIG_FILE} says "
                f"{wanted[:16]}; a file was changed or damaged, fit or copy the tokenizer again"
            )
        if tokenizer.encoder is not None:
            tokenizer.encoder.to(state["encoder.post_layernorm.weight"].dtype)
        tokenizer.load_state_dict(state)
        tokenizer._fingerprint = got
        return tokenizer


def _open(path: pathlib.Path) -> tuple[TokenizerConfig, str, dict[str, Stored]]:
    """Configuration, fingerprint, and what the file of weights holds."""
    config, fingerprint = _read_config(path)
    try:
        return config, fingerprint, open_safetensors(path / WEIGHTS_FILE, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; fit the tokenizer again") from error


def _grid(vision: VisionConfig) -> str:
    """The patch grid in words."""
    return (
        f"a grid of {vision.grid} x {vision.grid} patches (image_size={vision.image_size}, "
        f"patch_size={vision.patch_size})"
    )


def _describe(config: TokenizerConfig) -> dict[str, Any]:
    """The configuration as JSON values."""
    return {
        "format": FORMAT,
        "kind": config.kind,
        "feature_layer": config.feature_layer,
        "codebook_sizes": list(config.codebook_sizes),
        "vision": dataclasses.asdict(config.vision),
    }


def _fingerprint(config: TokenizerConfig, state: dict[str, Tensor]) -> str:
    """sha256 over the configuration and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(_describe(config), sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_config(path: pathlib.Path) -> tuple[TokenizerConfig, str]:
    """Configuration and fingerprint from ``config.json``."""
    file = path / CONFIG_FILE
    try:
        document = json.loads(file.read_text())
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']}, this version reads {FORMAT}")
        config = TokenizerConfig(
            kind=document["kind"],
            vision=VisionConfig(**document["vision"]),
            feature_layer=document["feature_layer"],
            codebook_sizes=tuple(document["codebook_sizes"]),
        )
        return config, document["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is not the description of a visual tokenizer ({error!r}); model."
            "visual_tokenizer is the folder that `asvr tokenizer fit` writes"
        ) from error
