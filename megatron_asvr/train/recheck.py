"""A sampled share of the cached codes, computed again while a run trains.

The cache's fingerprint tells that codes were made in the same way, not that this machine's kernels
round as those of the machine that made them. Which images of a step are compared is a function of
the seed, the step and the image alone, so every layout compares the same ones; nothing of the
training is touched, neither its random numbers nor its tensors.
"""

import hashlib
from collections.abc import Sequence

from megatron_asvr.platforms import select

import numpy as np

from megatron_asvr.batch import MicroBatch
from megatron_asvr.config.schema import Config
from megatron_asvr.data.cache import CodeCache
from megatron_asvr.errors import ConfigError, DataError
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.train.assemble import Data
from megatron_asvr.train.metrics import Recount

AT_ONCE = 64  # images encoded together


class CodeCheck:
    """Compares the codes of a share ``data.codes_verify_fraction`` of the images of every step.

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
        self._fraction = config.data.codes_verify_fraction if data.codes is not None else 0.0
        self._seed = config.run.seed
        self._data = data
        self._is_mine = groups.is_first_stage
        self._depth = len(data.codebook_sizes)
        limits = config.data.codes_max_flip
        if self._fraction and len(limits) not in (1, self._depth):
            raise ConfigError(
                f"data.codes_max_flip gives {len(limits)} limits for codes of {self._depth} "
                "depths; give one, or one for each depth"
            )
        self._limits = limits * self._depth if len(limits) == 1 else limits

    def counts(self, step: int, batches: Sequence[MicroBatch]) -> list[int]:
        """What this rank compared at a step: images, positions, and flips of every depth.

        Empty, on all ranks alike, where nothing is ever compared.

        Args:
            step: number of the step.
            batches: this rank's micro-batches of the step.

        Raises:
            DataError: an image or its codes cannot be read.
        """
        cache, tokenizer = self._data.codes, self._data.tokenizer
        if not self._fraction or cache is None or tokenizer is None:
            return []
        counts = np.zeros(2 + self._depth, dtype=np.int64)
        shares = (batch.image_keys[slice(*batch.image_share)] for batch in batches)
        keys = [
            key for share in shares for key in share if self._is_mine and self._wants(step, key)
        ]
        if keys:
            tokenizer = tokenizer.to(select()[0].device)
        for start in range(0, len(keys), AT_ONCE):
            chosen = keys[start : start + AT_ONCE]
            stored_IND = np.stack([cache.get(key) for key in chosen])
            codes_IND = tokenizer.encode(self._data.train.pixels_of(chosen)).cpu().numpy()
            flips_D = (codes_IND != stored_IND).sum(axis=(0, 1))
            counts += [len(chosen), stored_IND[..., 0].size, *flips_D]
        return counts.tolist()

    def judge(self, recount: Recount) -> None:
        """Return when not too many codes were different.

        Args:
            recount: sums over all ranks and some steps.

        Raises:
            DataError: at some depth more than its limit of ``data.codes_max_flip`` were.
        """
        cache = self._data.codes
        pairs = enumerate(zip(recount.shares(), self._limits, strict=False))
        wrong = [
            f"depth {depth}: {share:.2%} of {recount.positions} codes (limit {limit:.2%})"
            for depth, (share, limit) in pairs
            if share > limit
        ]
        if wrong and cache is not None:
            raise DataError(_message(cache, recount, wrong))

    def _wants(self, step: int, key: str) -> bool:
        digest = hashlib.sha256(f"{self._seed} {step} {key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < self._fraction * 2**64


def _message(cache: CodeCache, recount: Recount, wrong: Sequence[str]) -> str:
    return (
        f"the codes in {cache.folder} are not those that this run computes from the same images: "
        f"of {recount.images} images, {'; '.join(wrong)} differ. Its manifest.json says how they "
        "were made. Encode them here (`asvr tokenizer encode` with another data.cache_dir), set "
        "data.codes=online, or raise data.codes_max_flip if this many flips are expected"
    )
