"""A sampled share of what is cached of images, computed again while a run trains.

A cache's fingerprint tells that its values were made in the same way, not that this machine's
kernels round as those of the machine that made them. Which images of a step are compared is a
function of the seed, the step and the image alone, so every layout compares the same ones; nothing
of the training is touched, neither its random numbers nor its tensors.
"""

import hashlib
from collections.abc import Sequence

from megatron_asvr.platforms import select

import numpy as np

from megatron_asvr.batch import MicroBatch
from megatron_asvr.config.schema import Config
from megatron_asvr.data.cache import ImageCache
from megatron_asvr.errors import ConfigError, DataError
from megatron_asvr.model.images import ImageReader
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.train.assemble import Data
from megatron_asvr.train.metrics import Recount

AT_ONCE = 64  # images encoded together
MOVED = 0.01  # of a feature's length: more is another feature


class CacheCheck:
    """Compares what is cached of a share ``data.codes_verify_fraction`` of each step's images.

    An image is compared by the rank that encodes it for the model: of the first pipeline stage,
    and once in the whole layout. That rank keeps the tokenizer on its device.

    Args:
        config: the run.
        data: its loaders, tokenizer and cache.
        groups: process groups of the layout.

    Raises:
        ConfigError: ``data.codes_max_flip`` does not fit the depth of the codes.
    """

    def __init__(self, config: Config, data: Data, *, groups: Groups) -> None:
        self._has_features = config.data.features == "cache"
        checked = data.codes is not None or self._has_features
        self._fraction = config.data.codes_verify_fraction if checked else 0.0
        self._seed = config.run.seed
        self._data = data
        self._is_mine = groups.is_first_stage
        self._num_patches = config.model.vision.num_patches
        self._depth = len(data.codebook_sizes) if data.codes is not None else 0
        limits = config.data.codes_max_flip
        if self._fraction and data.codes is not None and len(limits) not in (1, self._depth):
            raise ConfigError(
                f"data.codes_max_flip gives {len(limits)} limits for codes of {self._depth} "
                "depths; give one, or one for each depth"
            )
        self._limits = limits * max(1, self._depth) if len(limits) == 1 else limits

    def counts(self, step: int, batches: Sequence[MicroBatch], images: ImageReader) -> list[int]:
        """What this rank compared at a step: images, positions, and what was different.

        That is, as far as they are cached, flips of every depth, and features that moved by more
        than ``MOVED``. Empty, on all ranks alike, where nothing is ever compared.

        Args:
            step: number of the step.
            batches: this rank's micro-batches of the step.
            images: encodes for the model.

        Raises:
            DataError: an image or what is cached of it cannot be read.
        """
        if not self._fraction:
            return []
        counts = np.zeros(2 + self._depth + self._has_features, dtype=np.int64)
        shares = (batch.image_keys[slice(*batch.image_share)] for batch in batches)
        keys = [
            key for share in shares for key in share if self._is_mine and self._wants(step, key)
        ]
        for start in range(0, len(keys), AT_ONCE):
            chosen = keys[start : start + AT_ONCE]
            counts += [len(chosen), len(chosen) * self._num_patches, *self._compare(chosen, images)]
        return counts.tolist()

    def _compare(self, keys: Sequence[str], images: ImageReader) -> list[int]:
        """Flips of every depth, and features that moved, of some images."""
        data, found = self._data, [0] * self._depth
        if data.codes is not None and data.tokenizer is not None:
            tokenizer = data.tokenizer.to(select()[0].device)
            stored_IND = np.stack([data.codes.get(key) for key in keys])
            codes_IND = tokenizer.encode(data.train.pixels_of(keys)).cpu().numpy()
            found = (codes_IND != stored_IND).sum(axis=(0, 1)).tolist()
        if self._has_features and data.train.features is not None:
            stored_INF = data.train.features.features(keys).float()
            features_INF = images.encode(data.train.crops_of(keys)).cpu().float()
            moved_IN = (features_INF - stored_INF).norm(dim=-1) > MOVED * stored_INF.norm(dim=-1)
            found.append(int(moved_IN.sum()))
        return found

    def judge(self, recount: Recount) -> None:
        """Return when not too many codes and features were different.

        Args:
            recount: sums over all ranks and some steps.

        Raises:
            DataError: at some depth more than its limit of ``data.codes_max_flip`` were, or more
                features than the largest of these.
        """
        pairs = zip(recount.shares(), self._limits, strict=False)
        wrong = [
            f"depth {depth}: {share:.2%} of {recount.positions} codes (limit {limit:.2%})"
            for depth, (share, limit) in enumerate(pairs)
            if share > limit
        ]
        if wrong and self._data.codes is not None:
            raise DataError(_message(self._data.codes, recount, wrong))
        share, limit = recount.feature_share(), max(self._limits)
        features = self._data.train.features
        if share > limit and features is not None:
            moved = f"{share:.2%} of {recount.positions} features (limit {limit:.2%})"
            raise DataError(_message(features, recount, [moved]))

    def _wants(self, step: int, key: str) -> bool:
        digest = hashlib.sha256(f"{self._seed} {step} {key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self._fraction * 2**64


def _message(cache: ImageCache, recount: Recount, wrong: Sequence[str]) -> str:
    return (
        f"the {cache.kind}s in {cache.folder} are not those that this run computes from the same "
        f"images: of {recount.images} images, {'; '.join(wrong)} differ. Its manifest.json says "
        "how they were made. Encode them here (`asvr tokenizer encode` with another "
        f"data.cache_dir), set data.{cache.kind}s=online, or raise data.codes_max_flip if this "
        "many are expected"
    )
