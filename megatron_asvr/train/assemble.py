"""From a configuration to everything a run needs, in the order in which mistakes can be found."""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_asvr.platforms import mcore, select  # noqa: F401  (mcore prepares the process)

import torch.distributed as dist

from megatron_asvr.config.check import check
from megatron_asvr.config.schema import Config
from megatron_asvr.data.cache import (
    CodeCache,
    FeatureCache,
    ImageCache,
    cache_facts,
    cache_root,
)
from megatron_asvr.data.collate import View
from megatron_asvr.data.loader import Loader
from megatron_asvr.data.records import SHOWN
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.errors import ConfigError
from megatron_asvr.model.asvr import DTYPES
from megatron_asvr.model.images import ImageReader
from megatron_asvr.model.linears import precision_lines
from megatron_asvr.model.tokenizer import TokenizerConfig, VisualTokenizer
from megatron_asvr.parallel.collectives import on_first
from megatron_asvr.parallel.groups import Groups, initialize
from megatron_asvr.parallel.plan import make_plan
from megatron_asvr.precision import Backend, check_attention, select_backend, select_fp8

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """The data of a run.

    Attributes:
        train: micro-batches of every step.
        held_out: samples for evaluation, None without ``data.eval``.
        tokenizer: the visual tokenizer, None when the visual loss is off.
        codes: the cache of its codes, None when they are not needed or computed online.
    """

    train: Loader
    held_out: Loader | None
    tokenizer: VisualTokenizer | None
    codes: CodeCache | None

    @property
    def caches(self) -> list[ImageCache]:
        """What is read from disk instead of computed; features as soon as they are opened."""
        return [cache for cache in (self.codes, self.train.features) if cache is not None]

    @property
    def loaders(self) -> list[Loader]:
        """All splits."""
        return list(self.splits.values())

    @property
    def splits(self) -> dict[str, Loader]:
        """All splits by name."""
        held_out = {} if self.held_out is None else {"eval": self.held_out}
        return {"train": self.train, **held_out}

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes of every depth; empty without a visual loss."""
        return self.tokenizer.codebook_sizes if self.tokenizer is not None else ()

    def close(self) -> None:
        """Stop the loaders' threads."""
        for loader in self.loaders:
            loader.close()


def make_groups(config: Config) -> Groups:
    """The process groups of this rank, after the checks that need the number of ranks.

    Raises:
        ConfigError: a setting cannot work, alone or with this number of ranks.
    """
    world = dist.get_world_size()
    check(config, world)
    check_attention(config, _backend(config))
    select_fp8(select()[0], DTYPES[config.train.precision], config.precision)
    described = _described(config)
    sizes, width = (described.codebook_sizes, described.width) if described else ((), None)
    lines = precision_lines(config, sizes, width)
    if dist.get_rank() == 0:
        logger.info("%s", "\n".join(lines))
    return initialize(make_plan(config, world, sizes), seed=config.run.seed)


def codebook_sizes(config: Config) -> tuple[int, ...]:
    """Codes of every depth, from the tokenizer's description; empty without a visual loss.

    Raises:
        CheckpointError: ``model.visual_tokenizer`` is no tokenizer's folder.
    """
    described = _described(config)
    return described.codebook_sizes if described is not None else ()


def _described(config: Config) -> TokenizerConfig | None:
    """What the visual tokenizer's folder says about it; None without a visual loss."""
    if not config.loss.visual_weight:
        return None
    folder = str(config.model.visual_tokenizer)
    group = dist.group.WORLD if dist.is_initialized() else None
    return on_first(partial(VisualTokenizer.describe, folder), group=group)


def open_data(config: Config, *, groups: Groups) -> Data:
    """The loaders, with every image checked, and the tokenizers that they need.

    All ranks take part. The code cache is opened, not filled (train/caches.py).

    Args:
        config: the run.
        groups: process groups of the layout.

    Raises:
        ConfigError: a tokenizer does not fit the model.
        CheckpointError: the visual tokenizer is damaged.
        DataError: a data file or too many images cannot be used.
    """
    tokenizer, cache = None, None
    if config.loss.visual_weight:
        tokenizer = VisualTokenizer.load(str(config.model.visual_tokenizer), group=groups.world)
        tokenizer.check_fits(config.model.vision)
        tokenizer.leave_out_unused()
        if config.data.codes == "cache":
            cache = code_cache(config, tokenizer)
            _make_folder(cache)
    text = TextTokenizer(str(config.model.text_tokenizer))
    branches, reason = shares_images(config)
    if groups.rank == 0:
        logger.info("questions about one image %s: %s", _HOW[branches], reason)
    splits, view = {}, _view(groups)
    for split in ("train", "eval"):
        if getattr(config.data, split):
            splits[split] = Loader(
                config,
                text,
                split=split,
                view=view,
                branches=branches,
                codes=cache,
                codebook_sizes=tokenizer.codebook_sizes if tokenizer is not None else (),
            )
            splits[split].prepare(group=groups.world)
            if groups.rank == 0:
                _tell_bad_images(split, splits[split].report(), config)
    return Data(
        train=splits["train"], held_out=splits.get("eval"), tokenizer=tokenizer, codes=cache
    )


def _view(groups: Groups) -> View:
    """What of a step's samples this rank gets."""
    return View(
        dp_rank=groups.dp_rank,
        dp=groups.plan.dp,
        cp_rank=groups.cp_rank,
        encoder_rank=groups.tp_cp.rank(),
        encoder_world=groups.tp_cp.size(),
        first_stage=groups.is_first_stage,
        text_loss=groups.has_text_loss,
        visual_loss=groups.is_last_stage,
    )


def code_cache(config: Config, tokenizer: VisualTokenizer) -> CodeCache:
    """The cache of the codes that this tokenizer gives with a configuration, on this device.

    Raises:
        DataError: its folder was made with other settings.
    """
    device = select()[0].device.type
    return CodeCache(
        cache_root(config),
        cache_facts(config, tokenizer.facts(device), device=device),
        num_patches=config.model.vision.num_patches,
        codebook_sizes=tokenizer.codebook_sizes,
    )


def open_features(config: Config, data: Data, images: ImageReader, *, groups: Groups) -> None:
    """Let the loaders read features from the cache of this encoder; all ranks take part.

    Args:
        config: the run.
        data: of the run, before its first step.
        images: with the encoder and its weights; rank 0 has it.
        groups: process groups of the layout.

    Raises:
        ConfigError: the cache's folder cannot be written.
        DataError: it was made with other settings.
    """
    device, model = select()[0].device.type, config.model
    facts = on_first(partial(images.facts, device), group=groups.world)
    cache = FeatureCache(
        cache_root(config),
        cache_facts(config, facts, device=device),
        num_patches=model.vision.num_patches,
        width=model.vision.hidden_size * model.resolution.num_scales,
        dtype=DTYPES[config.train.precision],
    )
    _make_folder(cache)
    for loader in data.loaders:
        loader.features = cache


def _make_folder(cache: ImageCache) -> None:
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(
            f"data.cache_dir={str(cache.root)!r} cannot be written: {err.strerror}; give another "
            f"folder, or set data.{cache.kind}s=online"
        ) from None


_HOW = {True: "share its tokens", False: "each repeat its tokens"}


_DONE = {"replace": "replaced by placeholders without loss", "drop": "left out of the order"}


def _tell_bad_images(split: str, report: dict[str, Any], config: Config) -> None:
    """Log which images cannot be used, before any of their records is met."""
    if not report["num_bad_images"]:
        return
    named = [f"{path}: {why}" for path, why in list(report["bad_images"].items())[:SHOWN]]
    logger.warning(
        "data.%s: %d of %d images cannot be used; their %d of %d records are %s:\n  %s",
        split,
        report["num_bad_images"],
        report["images"],
        report["bad_records"],
        report["records"],
        _DONE[config.data.on_bad_sample],
        "\n  ".join(named),
    )


def _backend(config: Config) -> Backend:
    """Which implementation the layers of the run use."""
    return select_backend(select()[0], DTYPES[config.train.precision], config.precision)[0]


def shares_images(config: Config) -> tuple[bool, str]:
    """Whether independent questions of a record share its image tokens, and why."""
    if config.loss.mode == "official":
        return False, "the official code has no mask between them"
    if _backend(config) == "te":
        return False, "Transformer Engine's attention takes no such mask here"
    return True, "the dense attention mask keeps them apart"
