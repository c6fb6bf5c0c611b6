"""Fit a visual tokenizer on the features of a frozen encoder."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_asvr.platforms import select

import torch
from torch import Tensor

from megatron_asvr.config.schema import Config, DataConfig, ModelConfig, RunConfig, SourceConfig
from megatron_asvr.data.pixels import PixelStore
from megatron_asvr.data.sources import Sources
from megatron_asvr.errors import ConfigError, DataError
from megatron_asvr.hf.importer import read_folder
from megatron_asvr.model.quantize import quantisation_report
from megatron_asvr.model.tokenizer import TokenizerConfig, VisualTokenizer

REPORT_FILE = "report.json"
_PREFIX = "vision_encoder."


@dataclass(frozen=True, kw_only=True, slots=True)
class FitRequest:
    """What to fit.

    Attributes:
        vision: Hugging Face folder of the encoder.
        sources: images to fit on, in LLaVA format.
        out: the tokenizer's folder.
        codebook_sizes: codewords of each level.
        kind: semantic or appearance.
        feature_layer: hidden state to quantise; None means pixels (appearance only).
        image_fit: as in ``data.image_fit``.
        max_images: at most so many images are read, spread evenly.
        seed: makes the result repeatable.
        iters: k-means iterations of each level.
        batch: images of one forward pass.
    """

    vision: str
    sources: tuple[SourceConfig, ...]
    out: str
    codebook_sizes: tuple[int, ...]
    kind: Literal["semantic", "appearance"] = "semantic"
    feature_layer: int | None = -2
    image_fit: Literal["square", "pad"] = "square"
    max_images: int = 10_000
    seed: int = 0
    iters: int = 10
    batch: int = 64


def fit_tokenizer(request: FitRequest) -> dict[str, Any]:
    """The report of a tokenizer that was fitted and saved in ``request.out``.

    Raises:
        ConfigError: the folder exists already, or settings do not fit the encoder.
        ConversionError: ``request.vision`` is no SigLIP folder.
        DataError: the data cannot be read, or holds no image that can be used.
    """
    out = Path(request.out)
    if (out / "config.json").exists():
        raise ConfigError(f"{out} already holds a visual tokenizer; give another --out")
    device = select()[0].device
    tokenizer = new_tokenizer(request).to(device)
    config = Config(
        run=RunConfig(dir=str(out)),
        model=ModelConfig(vision=tokenizer.config.vision),
        data=DataConfig(train=request.sources, image_fit=request.image_fit),
    )
    images = Sources(config, request.sources, device=device)
    images.prepare()
    found = images.report()
    keys = images.good_image_keys()
    if not keys:
        named = ", ".join(source.path for source in request.sources)
        raise DataError(f"{named}: no record has an image; there is nothing to fit on")
    keys = keys[:: max(1, -(-len(keys) // request.max_images))]
    store = PixelStore(config, device=device)

    def features() -> Iterator[Tensor]:
        for start in range(0, len(keys), request.batch):
            pixels = store.normalised(keys[start : start + request.batch], images.paths)
            yield tokenizer.features(pixels)

    with torch.no_grad():
        tokenizer.fit(features(), seed=request.seed, iters=request.iters)
        levels = quantisation_report(features(), tokenizer.codebooks.tables())
    tokenizer.save(out)
    report = {
        "fingerprint": tokenizer.fingerprint,
        "kind": request.kind,
        "feature_layer": request.feature_layer,
        "codebook_sizes": list(request.codebook_sizes),
        "width": tokenizer.width,
        "num_images": len(keys),
        "num_bad_images": found["num_bad_images"],
        "bad_images": found["bad_images"],
        "levels": [dataclasses.asdict(level) for level in levels],
    }
    (out / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def new_tokenizer(request: FitRequest) -> VisualTokenizer:
    """A tokenizer with the encoder's weights and codebooks yet to be fitted."""
    source = read_folder(request.vision)
    if source.vision is None:
        raise ConfigError(f"{request.vision} holds no vision encoder; give a SigLIP folder")
    tokenizer = VisualTokenizer(
        TokenizerConfig(
            kind=request.kind,
            vision=source.vision,
            feature_layer=request.feature_layer,
            codebook_sizes=request.codebook_sizes,
        )
    )
    if tokenizer.encoder is not None:
        names = tokenizer.encoder.state_dict()
        tokenizer.encoder.load_state_dict({name: source(_PREFIX + name) for name in names})
    return tokenizer
