"""The visual tokenizer's codes on disk, so that each image is tokenised once.

A cache folder is named by a fingerprint of everything that the codes depend on: preprocessing and
tokenizer. Codes are found by the hash of the image file's bytes. A part file is

    256 bytes of JSON (counts, data type, check sum) | keys, 32 bytes each | codes [I, N, D]

written atomically, never changed, and mapped into memory. A part that is damaged is left out and
counted, so its images are missing and are encoded again into another part.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_asvr.config.schema import Config
from megatron_asvr.data.files import fingerprint, write_atomically
from megatron_asvr.errors import DataError

FORMAT = 1
HEADER_BYTES = 256
KEY_BYTES = 32
SUFFIX = ".codes"


def code_fingerprint(config: Config, tokenizer_fingerprint: str) -> str:
    """Name of the cache that fits the configuration's preprocessing and this tokenizer."""
    return fingerprint(
        {
            "format": FORMAT,
            "image_size": config.model.vision.image_size,
            "image_fit": config.data.image_fit,
            "tokenizer": tokenizer_fingerprint,
        }
    )


def cache_root(config: Config) -> Path:
    """Folder of all caches: ``data.cache_dir``, or ``codes`` beside the run folder."""
    if config.data.cache_dir is not None:
        return Path(config.data.cache_dir)
    return Path(config.run.dir).parent / "codes"


@dataclass(frozen=True, slots=True)
class _Place:
    codes_IND: np.ndarray  # mapped
    row: int


class CodeCache:
    """Codes by image key.

    Args:
        root: folder of all caches.
        fingerprint: from :func:`code_fingerprint`.
        num_patches: patches of one image.
        codebook_sizes: of the tokenizer's depths; up to 65,536 each code takes two bytes.

    Attributes:
        damaged: names of part files that were found damaged.
    """

    def __init__(
        self,
        root: str | Path,
        fingerprint: str,
        *,
        num_patches: int,
        codebook_sizes: Sequence[int],
    ) -> None:
        self.folder = Path(root) / fingerprint[:32]
        self.num_patches = num_patches
        self.depth = len(codebook_sizes)
        self.dtype = np.dtype("<u2" if max(codebook_sizes) <= 2**16 else "<u4")
        self.damaged: set[str] = set()
        self._limits_D = np.asarray(codebook_sizes)
        self._places: dict[str, _Place] = {}
        self._read_parts: set[str] = set()
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """Read the parts that other processes have written since."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path.name in self._read_parts:
                continue
            try:
                keys, codes_IND = self._read(path)
            except (OSError, ValueError, KeyError, TypeError):
                self.damaged.add(path.name)
                continue
            self._read_parts.add(path.name)
            self._places.update((key, _Place(codes_IND, row)) for row, key in enumerate(keys))

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys without codes, each once, in order.

        Ranks that divide the answer among themselves have to ask before any of them writes.
        """
        self.refresh()
        return [key for key in dict.fromkeys(keys) if key not in self._places]

    def get(self, key: str) -> np.ndarray:
        """Codes [N, D] of one image.

        Raises:
            DataError: the cache does not have them.
        """
        place = self._places.get(key)
        if place is None:
            raise DataError(
                f"the code cache {self.folder} has no codes for the image with hash {key}; "
                "run `asvr tokenizer encode` with the same configuration, or set data.codes=online"
            )
        return place.codes_IND[place.row]

    def write(self, keys: Sequence[str], codes_IND: np.ndarray) -> None:
        """Add the codes of some images as one part file.

        Args:
            keys: of the images.
            codes_IND: their codes [I, N, D], any integer type.

        Raises:
            DataError: the shape does not fit, or a code lies outside its codebook.
        """
        wanted = (len(keys), self.num_patches, self.depth)
        if codes_IND.shape != wanted:
            raise DataError(f"codes have shape {codes_IND.shape}; this cache holds {wanted}")
        if len(keys) == 0:
            return
        if codes_IND.min() < 0 or (codes_IND >= self._limits_D).any():
            raise DataError(
                f"codes lie outside their codebooks of {self._limits_D.tolist()} entries: "
                f"{codes_IND.min()} to {codes_IND.max(axis=(0, 1)).tolist()}"
            )
        key_bytes = b"".join(bytes.fromhex(key) for key in keys)
        payload = key_bytes + np.ascontiguousarray(codes_IND, dtype=self.dtype).tobytes()
        header = {
            "format": FORMAT,
            "images": len(keys),
            "num_patches": self.num_patches,
            "depth": self.depth,
            "dtype": self.dtype.str,
            "crc32": zlib.crc32(payload),
        }
        name = hashlib.sha256(payload).hexdigest()[:32] + SUFFIX
        # Padded, so that the codes are aligned in memory.
        line = json.dumps(header).ljust(HEADER_BYTES - 1).encode() + b"\n"
        write_atomically(self.folder / name, line, payload)
        self.refresh()

    def _read(self, path: Path) -> tuple[list[str], np.ndarray]:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        header = json.loads(mapped[:HEADER_BYTES].tobytes())
        payload = mapped[HEADER_BYTES:]
        shape = (header["images"], self.num_patches, self.depth)
        same = (header["num_patches"], header["depth"]) == shape[1:]
        if not same or header["dtype"] != self.dtype.str or header["format"] != FORMAT:
            raise ValueError("the part belongs to another tokenizer")
        if zlib.crc32(payload) != header["crc32"]:
            raise ValueError("the check sum differs")
        end = header["images"] * KEY_BYTES
        keys = payload[:end].reshape(-1, KEY_BYTES)
        codes_IND = payload[end:].view(self.dtype).reshape(shape)
        return [row.tobytes().hex() for row in keys], codes_IND
