"""Fill the code cache: every image that a run needs is tokenised once, by all ranks together."""

import logging
import time
from collections.abc import Sequence

from megatron_asvr.platforms import select

import torch
import torch.distributed as dist

from megatron_asvr.config.schema import Config
from megatron_asvr.data.cache import CodeCache
from megatron_asvr.data.loader import Loader
from megatron_asvr.errors import ConfigError
from megatron_asvr.model.tokenizer import VisualTokenizer
from megatron_asvr.parallel.collectives import barrier, broadcast_object
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.train.assemble import Data, make_groups, open_data
from megatron_asvr.train.metrics import show_log

logger = logging.getLogger(__name__)

ENCODE_BATCH = 64  # images encoded together
PART_IMAGES = 4096  # images of one part file: what an interruption can cost
PROGRESS_S = 10.0


def fill_codes(data: Data, *, groups: Groups) -> int:
    """Number of images encoded now; afterwards the cache has the codes of all of them.

    The missing images are divided over all ranks; nothing is encoded twice, and an interrupted
    call continues where its last part file ends. All ranks take part.

    Args:
        data: of the run; its cache is on storage that all ranks share.
        groups: process groups of the layout.

    Raises:
        DataError: an image can no longer be decoded, or a part file cannot be written.
    """
    cache, tokenizer = data.codes, data.tokenizer
    if cache is None or tokenizer is None:
        return 0
    owner = {key: loader for loader in data.loaders for key in loader.image_keys()}
    # Rank 0 looks for all: a rank that already sees what another job is writing would divide
    # another list, and leave while the others wait.
    found = cache.missing(owner) if groups.rank == 0 else None
    missing = broadcast_object(found, group=groups.world)
    if not missing:
        cache.refresh()
        return 0
    platform, _ = select()
    tokenizer = tokenizer.to(platform.device)
    mine = missing[groups.rank :: groups.plan.world]
    for start in range(0, len(mine), PART_IMAGES):
        _write_part(cache, mine[start : start + PART_IMAGES], owner, tokenizer, len(mine), start)
    tokenizer.cpu()  # training needs the device's memory, and no more codes
    barrier(group=groups.world)
    cache.refresh()
    if groups.rank == 0:
        logger.info("encoded %d images into codes at %s", len(missing), cache.folder)
    return len(missing)


def encode_all(config: Config) -> dict[str, object]:
    """What filling the code cache of a configuration did; call it on every rank.

    Args:
        config: its data and tokenizer.

    Raises:
        ConfigError: the configuration needs no cache.
    """
    if dist.get_rank() == 0:
        show_log("stderr")
    groups = make_groups(config)
    data = open_data(config, groups=groups)
    if data.codes is None:
        raise ConfigError(
            f"loss.visual_weight={config.loss.visual_weight} with data.codes={config.data.codes!r} "
            "needs no cache; codes are cached with a visual loss and data.codes=cache"
        )
    encoded = fill_codes(data, groups=groups)
    data.close()
    return {"encoded": encoded, "cached": len(data.codes), "folder": str(data.codes.folder)}


def _write_part(
    cache: CodeCache,
    keys: Sequence[str],
    owner: dict[str, Loader],
    tokenizer: VisualTokenizer,
    total: int,
    done: int,
) -> None:
    """Encode ``keys`` and write them as one part file."""
    codes, last = [], time.monotonic()
    for loader in dict.fromkeys(owner[key] for key in keys):
        own = [key for key in keys if owner[key] is loader]
        for start in range(0, len(own), ENCODE_BATCH):
            batch = own[start : start + ENCODE_BATCH]
            codes.append((batch, tokenizer.encode(loader.pixels_of(batch)).cpu()))
            done += len(batch)
            if time.monotonic() - last > PROGRESS_S:
                last = time.monotonic()
                logger.info("codes: %d of this rank's %d images", done, total)
    order = [key for batch, _ in codes for key in batch]
    cache.write(order, torch.cat([part for _, part in codes]).numpy())
