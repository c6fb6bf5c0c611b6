"""Fit a visual tokenizer on the features of a frozen encoder, over ranks, in bounded memory.

Features of all images never fit into memory, and k-means reads its vectors many times. So the
images are read once, in blocks of one forward pass; of every block a random sample of its vectors
is kept, such that all blocks together have ``max_vectors``, however many images there are. Blocks
go to ranks in turn; which rank has one changes nothing (model/kmeans.py).

Every block and every iteration is kept in ``<out>/unfinished`` until the tokenizer is complete. A
fit that was interrupted continues from there when it is called again, on any number of ranks, and
gives the same tokenizer.
"""

import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatron_asvr.platforms import select

import torch.distributed as dist

from megatron_asvr.config.schema import Config, DataConfig, ModelConfig, RunConfig, SourceConfig
from megatron_asvr.data.files import write_atomically
from megatron_asvr.data.pixels import PixelStore, pixel_facts
from megatron_asvr.data.sources import Sources
from megatron_asvr.errors import ConfigError, DataError
from megatron_asvr.hf.importer import read_folder
from megatron_asvr.log import show_log
from megatron_asvr.model.kmeans import fit_codebooks
from megatron_asvr.model.quantize import quantisation_report
from megatron_asvr.model.tokenizer import TokenizerConfig, VisualTokenizer
from megatron_asvr.parallel.collectives import on_first
from megatron_asvr.parallel.stored import read_shared
from megatron_asvr.train.fit_sample import FitSample

logger = logging.getLogger(__name__)

REPORT_FILE = "report.json"
UNFINISHED = "unfinished"
_PREFIX = "vision_encoder."


@dataclass(frozen=True, kw_only=True, slots=True)
class FitRequest:
    """What to fit.

    Attributes:
        vision: Hugging Face folder of the encoder.
        sources: images to fit on, as in ``data.train``.
        out: the tokenizer's folder, on storage that all ranks share.
        codebook_sizes: codewords of each level.
        kind: semantic or appearance.
        feature_layer: hidden state to quantise; None means pixels (appearance only).
        image_fit: as in ``data.image_fit``.
        max_images: at most so many images are read, spread evenly.
        max_vectors: vectors that all ranks together keep, 4 bytes x width each; default: 64 for
            each codeword of the largest level, and 65536 at least.
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
    max_vectors: int | None = None
    seed: int = 0
    iters: int = 10
    batch: int = 64


def fit_tokenizer(request: FitRequest) -> dict[str, Any]:
    """The report of a tokenizer that was fitted and saved in ``request.out``.

    Every rank of the process group calls it; without one this process does all.

    Raises:
        ConfigError: the folder exists already, holds the beginnings of another fit, or settings do
            not fit the encoder.
        ConversionError: ``request.vision`` is no SigLIP folder.
        DataError: the data cannot be read, or holds no image that can be used.
    """
    group = dist.group.WORLD if dist.is_initialized() else None
    rank = group.rank() if group is not None else 0
    if rank == 0:
        show_log("stderr")
    on_first(lambda: _check_new(Path(request.out)), group=group)
    device = select()[0].device
    tokenizer = new_tokenizer(request).to(device)
    config = Config(
        run=RunConfig(dir=request.out),
        model=ModelConfig(vision=tokenizer.config.vision),
        data=DataConfig(train=request.sources, image_fit=request.image_fit, max_bad_share=1.0),
    )
    images = Sources(config, request.sources, device=device)
    images.prepare(group=group)
    keys = _chosen(images, request)
    sample = FitSample(
        Path(request.out) / UNFINISHED,
        keys,
        num_patches=tokenizer.config.vision.num_patches,
        max_vectors=request.max_vectors,
        codebook_sizes=request.codebook_sizes,
        batch=request.batch,
        iters=request.iters,
        seed=request.seed,
        facts={**pixel_facts(config, device.type), **tokenizer.facts(device.type)},
        group=group,
    )
    if rank == 0:
        gib = sample.num_vectors * tokenizer.width * 4 / 2**30
        line = "%d of %d vectors of %d images are kept: %.2f GiB on all ranks together"
        logger.info(line, sample.num_vectors, sample.num_all, len(keys), gib)
    store = PixelStore(config, device=device, cache_bytes=0)
    sample.read(lambda own: tokenizer.features(store.normalised(own, images.paths)))
    tokenizer.set_codebooks(
        fit_codebooks(
            sample.vectors(device, tokenizer.width),
            request.codebook_sizes,
            seed=request.seed,
            iters=request.iters,
            group=group,
            journal=sample,
        )
    )
    levels = quantisation_report(sample.stored(device), tokenizer.codebooks.tables(), group=group)
    found = images.report()
    report = {
        **_facts(tokenizer, request),
        "num_images": len(keys),
        "num_vectors": sample.num_vectors,
        "num_vectors_of_all": sample.num_all,
        "num_bad_images": found["num_bad_images"],
        "bad_images": found["bad_images"],
        "levels": [dataclasses.asdict(level) for level in levels],
    }
    on_first(lambda: _publish(tokenizer, report, Path(request.out)), group=group)
    return report


def new_tokenizer(request: FitRequest) -> VisualTokenizer:
    """A tokenizer with the encoder's weights and codebooks yet to be fitted; all ranks call it."""
    group = dist.group.WORLD if dist.is_initialized() else None
    source = on_first(partial(read_folder, request.vision), group=group)
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
        names = [_PREFIX + name for name in tokenizer.encoder.state_dict()]
        found = read_shared(source.weights, names, group=group)
        state = {name.removeprefix(_PREFIX): x.cpu().clone() for name, x in found}
        tokenizer.encoder.load_state_dict(state)
    return tokenizer


def _chosen(images: Sources, request: FitRequest) -> list[str]:
    """Keys of the images that are read, spread evenly over all good ones."""
    keys = images.good_image_keys()
    if not keys:
        named = ", ".join(source.path for source in request.sources)
        raise DataError(f"{named}: no record has an image; there is nothing to fit on")
    return keys[:: max(1, -(-len(keys) // request.max_images))]


def _facts(tokenizer: VisualTokenizer, request: FitRequest) -> dict[str, Any]:
    """What the tokenizer is, for its report."""
    return {
        "fingerprint": tokenizer.fingerprint,
        "kind": request.kind,
        "feature_layer": request.feature_layer,
        "codebook_sizes": list(request.codebook_sizes),
        "width": tokenizer.width,
    }


def _check_new(out: Path) -> None:
    if (out / "config.json").exists():
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)  # killed while it was being removed
        raise ConfigError(f"{out} already holds a visual tokenizer; give another --out")


def _publish(tokenizer: VisualTokenizer, report: dict[str, Any], out: Path) -> None:
    text = json.dumps(report, indent=2) + "\n"
    write_atomically(out / REPORT_FILE, text.encode())
    tokenizer.save(out)
    shutil.rmtree(out / UNFINISHED)
