"""The vectors that a visual tokenizer is fitted to, and how far its fit is, on disk."""

import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_asvr.data.files import write_atomically
from megatron_asvr.errors import ConfigError, DataError
from megatron_asvr.log import Progress
from megatron_asvr.parallel.collectives import barrier, on_first

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
LEAST_VECTORS = 2**16
VECTORS_OF_A_CODEWORD = 64


class FitSample:
    """A random sample of bounded size of the vectors of some images, and the journal of a fit.

    The images are read in blocks of ``batch``. A block keeps as many vectors as its share of the
    images is of all, drawn from the seed and its number alone.

    Args:
        folder: where everything is kept, on storage that all ranks share.
        keys: of the images.
        num_patches: vectors of one image.
        max_vectors: vectors that are kept at most.
        codebook_sizes: of the levels.
        batch: images of a block.
        iters: iterations of each level.
        seed: of the sample.
        facts: everything else that decides the vectors, by name.
        group: ranks that share the blocks.

    Raises:
        ConfigError: the folder holds the beginnings of another fit, or fewer vectors are kept than
            a codebook has codewords.
        DataError: it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        keys: Sequence[str],
        *,
        num_patches: int,
        max_vectors: int | None,
        codebook_sizes: Sequence[int],
        batch: int,
        iters: int,
        seed: int,
        facts: Mapping[str, Any],
        group: ProcessGroup | None,
    ) -> None:
        if max_vectors is None:
            max_vectors = max(LEAST_VECTORS, VECTORS_OF_A_CODEWORD * max(codebook_sizes))
        self.num_all = len(keys) * num_patches
        self.num_vectors = min(max_vectors, self.num_all)
        if self.num_vectors < max(codebook_sizes):
            raise ConfigError(
                f"codebook sizes {list(codebook_sizes)} need at least {max(codebook_sizes)} "
                f"vectors, and {self.num_vectors} of {self.num_all} are kept; give more images, a "
                "larger --max-vectors or smaller codebooks"
            )
        self._folder, self._keys, self._group = folder, keys, group
        self._num_patches, self._batch, self._seed = num_patches, batch, seed
        self._rank, self._world = (group.rank(), group.size()) if group is not None else (0, 1)
        self._num_blocks = -(-len(keys) // batch)
        settings = {
            **facts,
            "images": sha256("".join(keys).encode()).hexdigest(),
            "vectors kept": self.num_vectors,
            "codebook sizes": list(codebook_sizes),
            "images of a block": batch,
            "iterations": iters,
            "seed": seed,
        }
        on_first(lambda: self._open(settings), group=group)
        units = len(codebook_sizes) * (iters + 1)
        self._fitting = Progress("k-means", units, unit="iterations")

    @property
    def mine(self) -> range:
        """Numbers of this rank's blocks."""
        return range(self._rank, self._num_blocks, self._world)

    def read(self, features: Callable[[Sequence[str]], Tensor]) -> None:
        """Keep the vectors of this rank's blocks that an earlier start has not kept.

        Args:
            features: from the keys of a block's images to their vectors [I, N, C].

        Raises:
            DataError: an image or a file fails.
        """
        fresh = [number for number in self.mine if _read(self._block(number)) is None]
        kept = len(self.mine) - len(fresh)
        if kept:
            logger.info("features: %d blocks of an earlier start are used", kept)
        progress = Progress("features", len(fresh) * self._batch, unit="images of this rank")
        for number in fresh:
            keys = self._keys[number * self._batch : (number + 1) * self._batch]
            vectors_RC = features(keys).flatten(0, 1)
            _write(self._block(number), vectors_RC[self._chosen(number, len(vectors_RC))].cpu())
            progress.add(self._batch)
        barrier(group=self._group)

    def stored(self, device: torch.device) -> Iterator[Tensor]:
        """The kept vectors [R, C] of one block of this rank after the other."""
        for number in self.mine:
            found = _read(self._block(number))
            if found is None:
                raise DataError(
                    f"{self._block(number)} was damaged during the fit; the same command reads "
                    "its images again"
                )
            yield found[0].to(device)

    def vectors(self, device: torch.device, width: int) -> dict[int, Tensor]:
        """All kept vectors of this rank by the number of their block, at least an empty one."""
        blocks = dict(zip(self.mine, self.stored(device), strict=True))
        # A rank without blocks needs the width all the same.
        return blocks or {self._num_blocks + self._rank: torch.empty(0, width, device=device)}

    def load(self, level: int) -> tuple[int, Tensor] | None:
        """Iterations done and codewords of a level, from an earlier start."""
        found = _read(self._level(level))
        if found is None:
            return None
        codebook_KC, iterations = found
        logger.info("k-means: level %d goes on after iteration %d", level, iterations)
        self._fitting.skip(iterations + 1)
        return iterations, codebook_KC

    def save(self, level: int, iterations: int, codebook_KC: Tensor) -> None:
        """Keep the codewords of a level."""
        _write(self._level(level), codebook_KC, iterations)
        self._fitting.add(1, f"level {level}")

    def _block(self, number: int) -> Path:
        return self._folder / f"block-{number:06d}.safetensors"

    def _level(self, number: int) -> Path:
        return self._folder / f"level-{number}.safetensors"

    def _chosen(self, number: int, count: int) -> Tensor:
        """Which of a block's vectors are kept, in order."""
        first = number * self._batch
        ends = (first, min(first + self._batch, len(self._keys)))
        before, after = (self.num_vectors * end // len(self._keys) for end in ends)
        digest = sha256(f"{self._seed} block {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randperm(count, generator=generator)[: after - before].sort().values

    def _open(self, settings: Mapping[str, Any]) -> None:
        """Note what is fitted, or refuse to go on with something else."""
        file = self._folder / SETTINGS
        if not file.exists():
            _save_bytes(file, json.dumps(settings, indent=2).encode() + b"\n")
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        changed = [
            f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
            for name in {**before, **settings}
            if before.get(name) != settings.get(name)
        ]
        if changed:
            raise ConfigError(
                f"{self._folder} holds the beginnings of another fit: {'; '.join(changed)}; repeat "
                "that command, delete the folder, or give another --out"
            )


def _write(path: Path, x: Tensor, iterations: int = 0) -> None:
    """Keep a tensor and a number in a file that is whole or absent."""
    x = x.contiguous()
    sum_of_bytes = zlib.crc32(x.view(torch.uint8).numpy())
    facts = {"crc32": str(sum_of_bytes), "iterations": str(iterations)}
    _save_bytes(path, save({"x": x}, facts))


def _save_bytes(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror}; the same command goes on from what is "
            "there"
        ) from error


def _read(path: Path) -> tuple[Tensor, int] | None:
    """What ``_write`` kept, or None when it is absent or damaged."""
    try:
        with safe_open(path, "pt") as file:
            x, facts = file.get_tensor("x"), file.metadata()
        whole = zlib.crc32(x.view(torch.uint8).numpy()) == int(facts["crc32"])
        return (x, int(facts["iterations"])) if whole else None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
