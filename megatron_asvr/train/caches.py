"""Fill the caches: what a run needs of every image is computed once, by all ranks together."""

import contextlib
import logging
import shutil
from collections.abc import Sequence
from functools import partial

from megatron_asvr.platforms import select

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_asvr.config.schema import Config
from megatron_asvr.data.cache import ImageCache
from megatron_asvr.data.loader import Loader
from megatron_asvr.data.views import picture_key
from megatron_asvr.errors import ConfigError, DataError
from megatron_asvr.log import Progress, show_log
from megatron_asvr.model.asvr import DTYPES
from megatron_asvr.model.images import ImageReader
from megatron_asvr.model.sharding import seeded_init
from megatron_asvr.model.tokenizer import VisualTokenizer
from megatron_asvr.model.vision import SiglipEncoder
from megatron_asvr.parallel.collectives import barrier, gather_objects, on_first
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.train.assemble import Data, make_groups, open_data, open_features
from megatron_asvr.train.parity import check_parity
from megatron_asvr.train.weight_sources import load_sources

logger = logging.getLogger(__name__)

ENCODE_BATCH = 64  # images encoded together
PART_IMAGES = 4096  # images of one part file, at most: what an interruption can cost
PART_BYTES = 2**28  # of one part file, about, which is collected in memory


def fill_caches(
    data: Data, *, groups: Groups, images: ImageReader | None = None, encode: bool = True
) -> int:
    """Number of images encoded now; afterwards the caches have what is wanted of all of them.

    The missing images are divided over the ranks that can encode them; nothing is encoded twice,
    and an interrupted call continues where its last part file ends. All ranks take part.

    Args:
        data: of the run; its caches are on storage that all ranks share.
        groups: process groups of the layout.
        images: encodes them for a cache of features; on a rank without an encoder too.
        encode: false: that something is missing is an error.

    Raises:
        DataError: an image can no longer be decoded, a part file cannot be written or has no room,
            or something is missing and ``encode`` is false.
    """
    if not data.caches:
        return 0
    owner = {key: loader for loader in data.loaders for key in loader.image_keys()}
    # Rank 0 looks for all: a rank that already sees what another job is writing would divide
    # another list, and leave while the others wait.
    find = partial(_missing, data.caches, list(owner), encode)
    missing: dict[str, list[str]] = on_first(find, group=groups.world)
    alike: dict[tuple[str, ...], list[str]] = {}  # images that lack the same
    for key in dict.fromkeys(key for keys in missing.values() for key in keys):
        alike.setdefault(tuple(kind for kind in missing if key in missing[kind]), []).append(key)
    for kinds, keys in alike.items():
        caches = [cache for cache in data.caches if cache.kind in kinds]
        mine = _share(keys, "feature" not in kinds or images is not None, groups)
        _encode(caches, mine, owner, data.tokenizer, images)
    barrier(group=groups.world)
    if groups.rank == 0:
        for cache in data.caches:
            cache.write_index()
    barrier(group=groups.world)
    for cache in data.caches:
        cache.refresh()
    return sum(map(len, alike.values()))


def encode_all(config: Config) -> dict[str, object]:
    """What filling the caches of a configuration did; call it on every rank.

    Every file of the caches is read first: the images of damaged ones are encoded again.

    Args:
        config: its data, tokenizer and encoder.

    Raises:
        ConfigError: the configuration needs no cache.
    """
    if dist.get_rank() == 0:
        show_log("stderr")
    groups = make_groups(config)
    config = check_parity(config, groups=groups)
    with contextlib.closing(open_data(config, groups=groups)) as data:
        images = None
        if config.data.features == "cache":
            images = ImageReader(
                config, groups=groups, encoder=_encoder(config, groups), tokenizer=None
            )
            if data.tokenizer is not None:
                logger.info("%s", images.join(data.tokenizer))
            open_features(config, data, images, groups=groups)
        if not data.caches:
            raise ConfigError(
                f"loss.visual_weight={config.loss.visual_weight} with data.codes="
                f"{config.data.codes!r} needs no cache; codes are cached with a visual loss and "
                "data.codes=cache, a frozen encoder's features with data.features=cache"
            )
        damaged = _check_files(data.caches, groups)
        encoded = fill_caches(data, groups=groups, images=images)
        reports = [loader.report() for loader in data.loaders]
    held = {"cached": len, "folder": lambda cache: str(cache.folder)}
    return {
        "encoded": encoded,
        **{name: of(cache) for cache in data.caches[:1] for name, of in held.items()},
        **{f"{x.kind}s": {n: of(x) for n, of in held.items()} for x in data.caches[1:]},
        "damaged_parts": damaged,
        "num_bad_images": sum(report["num_bad_images"] for report in reports),
        "bad_images": {path: why for r in reports for path, why in r["bad_images"].items()},
    }


def _encoder(config: Config, groups: Groups) -> SiglipEncoder:
    """The model's encoder alone, as a run starts with it; all ranks take part."""
    vision, dtype = config.model.vision, DTYPES[config.train.precision]
    encoder = SiglipEncoder(vision).to(select()[0].device, dtype).requires_grad_(False)
    alone = nn.ModuleDict({"vision_encoder": encoder})
    seeded_init(alone, config.run.seed, groups=groups, std=vision.init_std)
    load_sources([alone], config, facts={}, groups=groups)
    encoder.leave_out_unused()
    return encoder


def _check_files(caches: Sequence[ImageCache], groups: Groups) -> dict[str, str]:
    """Damaged part files and why, of all that the ranks find together; all are set aside."""
    mine: dict[str, str] = {}
    for cache in caches:
        mine |= {**cache.damaged, **cache.check(groups.rank, groups.plan.world)}
    shares = gather_objects(mine, group=groups.world)
    damaged = {name: why for share in shares for name, why in share.items()}
    if damaged and groups.rank == 0:
        named = "".join(f"\n  {name}: {why}" for name, why in damaged.items())
        logger.warning("%d damaged files of the cache are set aside:%s", len(damaged), named)
    return damaged


def _missing(
    caches: Sequence[ImageCache], keys: Sequence[str], encode: bool
) -> dict[str, list[str]]:
    """The keys that each cache lacks, by its kind."""
    found = {cache.kind: cache.missing(keys) for cache in caches}
    for cache in caches:
        number, room = len(found[cache.kind]), shutil.disk_usage(cache.folder).free
        if number and not encode:
            raise DataError(_refusal(cache, number, len(keys)))
        size = number * cache.row_bytes
        if size > room:
            raise DataError(
                f"the {cache.kind} cache {cache.folder} lacks {number} images, which take "
                f"{size / 2**30:.2f} GiB; {room / 2**30:.2f} GiB are free. Give another "
                f"data.cache_dir, or set data.{cache.kind}s=online"
            )
        if number:
            logger.info(
                "%ss: %d of %d images are missing in %s and are encoded now (%.3f GiB)%s",
                cache.kind,
                number,
                len(keys),
                cache.folder,
                size / 2**30,
                cache.differences(),
            )
    return found


def _refusal(cache: ImageCache, missing: int, wanted: int) -> str:
    return (
        f"the {cache.kind} cache {cache.folder} has no {cache.kind}s of {missing} of {wanted} "
        "images, and data.encode_missing=false: run `asvr tokenizer encode` with this "
        f"configuration, or use the settings of a cache that has them{cache.differences()}"
    )


def _share(keys: Sequence[str], able: bool, groups: Groups) -> list[str]:
    """What this rank encodes of some images; none where it is not able to."""
    ranks = [rank for rank, x in enumerate(gather_objects(able, group=groups.world)) if x]
    if not able:
        return []
    # A picture is decoded once for all its views, so they stay together.
    pictures = list(dict.fromkeys(map(picture_key, keys)))
    own = set(pictures[ranks.index(groups.rank) :: len(ranks)])
    return [key for key in keys if picture_key(key) in own]


def _encode(
    caches: Sequence[ImageCache],
    keys: Sequence[str],
    owner: dict[str, Loader],
    tokenizer: VisualTokenizer | None,
    images: ImageReader | None,
) -> None:
    """Encode this rank's share of the missing images and write it as part files."""
    if tokenizer is not None:
        tokenizer = tokenizer.to(select()[0].device)
    kinds = [cache.kind for cache in caches]
    progress = Progress(f"{' and '.join(kinds)}s", len(keys), unit="images of this rank")
    size = min(PART_IMAGES, max(1, PART_BYTES // max(cache.row_bytes for cache in caches)))
    for start in range(0, len(keys), size):
        part = keys[start : start + size]
        order: list[str] = []
        found: list[dict[str, Tensor]] = []
        for loader in dict.fromkeys(owner[key] for key in part):
            own = [key for key in part if owner[key] is loader]
            for first in range(0, len(own), ENCODE_BATCH):
                batch = own[first : first + ENCODE_BATCH]
                found.append(_values(kinds, batch, loader, tokenizer, images))
                order += batch
                progress.add(len(batch))
        for cache in caches:
            cache.add(order, torch.cat([values[cache.kind] for values in found]))
    if tokenizer is not None:
        tokenizer.cpu()  # training needs the device's memory, and no more codes


def _values(
    kinds: Sequence[str],
    keys: Sequence[str],
    loader: Loader,
    tokenizer: VisualTokenizer | None,
    images: ImageReader | None,
) -> dict[str, Tensor]:
    """What is wanted of some images, on the CPU; where it can be, from one pass."""
    if images is not None and tokenizer is not None and images.joined and len(kinds) == 2:
        features_INF, codes_IND = images.encode_both(loader.crops_of(keys), tokenizer)
        return {"feature": features_INF.cpu(), "code": codes_IND.cpu()}
    found = {}
    if "code" in kinds and tokenizer is not None:
        found["code"] = tokenizer.encode(loader.pixels_of(keys)).cpu()
    if "feature" in kinds and images is not None:
        found["feature"] = images.encode(loader.crops_of(keys)).cpu()
    return found
