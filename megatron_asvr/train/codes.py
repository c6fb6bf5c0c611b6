"""Fill the code cache: every image that a run needs is tokenised once, by all ranks together."""

import contextlib
import logging
from collections.abc import Sequence

from megatron_asvr.platforms import select

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_asvr.config.schema import Config
from megatron_asvr.data.cache import CodeCache
from megatron_asvr.data.loader import Loader
from megatron_asvr.data.views import picture_key
from megatron_asvr.errors import ConfigError, DataError
from megatron_asvr.log import Progress, show_log
from megatron_asvr.model.tokenizer import VisualTokenizer
from megatron_asvr.parallel.collectives import barrier, broadcast_object, gather_objects
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.train.assemble import Data, make_groups, open_data
from megatron_asvr.train.parity import check_parity

logger = logging.getLogger(__name__)

ENCODE_BATCH = 64  # images encoded together
PART_IMAGES = 4096  # images of one part file: what an interruption can cost


def fill_codes(data: Data, *, groups: Groups, encode: bool = True) -> int:
    """Number of images encoded now; afterwards the cache has the codes of all of them.

    The missing images are divided over all ranks; nothing is encoded twice, and an interrupted
    call continues where its last part file ends. All ranks take part.

    Args:
        data: of the run; its cache is on storage that all ranks share.
        groups: process groups of the layout.
        encode: false: that codes are missing is an error.

    Raises:
        DataError: an image can no longer be decoded, a part file cannot be written, or codes are
            missing and ``encode`` is false.
    """
    cache, tokenizer = data.codes, data.tokenizer
    if cache is None or tokenizer is None:
        return 0
    owner = {key: loader for loader in data.loaders for key in loader.image_keys()}
    # Rank 0 looks for all: a rank that already sees what another job is writing would divide
    # another list, and leave while the others wait.
    found = cache.missing(owner) if groups.rank == 0 else None
    missing = broadcast_object(found, group=groups.world)
    if missing:
        if not encode:
            raise DataError(_refusal(cache, len(missing), len(owner)))
        if groups.rank == 0:
            logger.info(
                "codes: %d of %d images are missing in %s and are encoded now%s",
                len(missing),
                len(owner),
                cache.folder,
                cache.differences(),
            )
        # A picture is decoded once for all its views, so they stay together.
        pictures = list(dict.fromkeys(map(picture_key, missing)))
        own = set(pictures[groups.rank :: groups.plan.world])
        mine = [key for key in missing if picture_key(key) in own]
        _encode(cache, mine, owner, tokenizer)
        barrier(group=groups.world)
    if groups.rank == 0:
        cache.write_index()
    barrier(group=groups.world)
    cache.refresh()
    return len(missing)


def encode_all(config: Config) -> dict[str, object]:
    """What filling the code cache of a configuration did; call it on every rank.

    Every file of the cache is read first: the images of damaged ones are encoded again.

    Args:
        config: its data and tokenizer.

    Raises:
        ConfigError: the configuration needs no cache.
    """
    if dist.get_rank() == 0:
        show_log("stderr")
    groups = make_groups(config)
    config = check_parity(config, groups=groups)
    with contextlib.closing(open_data(config, groups=groups)) as data:
        if data.codes is None:
            raise ConfigError(
                f"loss.visual_weight={config.loss.visual_weight} with data.codes="
                f"{config.data.codes!r} needs no cache; codes are cached with a visual loss and "
                "data.codes=cache"
            )
        damaged = _check_files(data.codes, groups)
        encoded = fill_codes(data, groups=groups)
        reports = [loader.report() for loader in data.loaders]
    return {
        "encoded": encoded,
        "cached": len(data.codes),
        "folder": str(data.codes.folder),
        "damaged_parts": damaged,
        "num_bad_images": sum(report["num_bad_images"] for report in reports),
        "bad_images": {path: why for r in reports for path, why in r["bad_images"].items()},
    }


def _check_files(cache: CodeCache, groups: Groups) -> dict[str, str]:
    """Damaged part files and why, of all that the ranks find together; all are set aside."""
    mine = cache.check(groups.rank, groups.plan.world)
    shares = gather_objects({**cache.damaged, **mine}, group=groups.world)
    damaged = {name: why for share in shares for name, why in share.items()}
    if damaged and groups.rank == 0:
        named = "".join(f"\n  {name}: {why}" for name, why in damaged.items())
        logger.warning("%d damaged files of codes are set aside:%s", len(damaged), named)
    return damaged


def _refusal(cache: CodeCache, missing: int, wanted: int) -> str:
    return (
        f"the code cache {cache.folder} has no codes of {missing} of {wanted} images, and "
        "data.encode_missing=false: run `asvr tokenizer encode` with this configuration, or use "
        f"the settings of a cache that has them{cache.differences()}"
    )


def _encode(
    cache: CodeCache, keys: Sequence[str], owner: dict[str, Loader], tokenizer: VisualTokenizer
) -> None:
    """Encode this rank's share of the missing images and write it as part files."""
    tokenizer = tokenizer.to(select()[0].device)
    progress = Progress("codes", len(keys), unit="images of this rank")
    for start in range(0, len(keys), PART_IMAGES):
        part = keys[start : start + PART_IMAGES]
        codes: list[tuple[list[str], Tensor]] = []
        for loader in dict.fromkeys(owner[key] for key in part):
            own = [key for key in part if owner[key] is loader]
            for first in range(0, len(own), ENCODE_BATCH):
                batch = own[first : first + ENCODE_BATCH]
                codes.append((batch, tokenizer.encode(loader.pixels_of(batch)).cpu()))
                progress.add(len(batch))
        order = [key for batch, _ in codes for key in batch]
        cache.write(order, torch.cat([found for _, found in codes]).numpy())
    tokenizer.cpu()  # training needs the device's memory, and no more codes
