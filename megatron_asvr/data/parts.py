"""One part file of a cache: codes or features of up to some thousand images, written once.

    256 bytes of JSON | keys, 32 bytes each | check sums, 4 bytes each | values [I, N, D]

The name tells the number of images, so that a file of the wrong size is seen without opening it. A
row's check sum covers its key and its values and is compared whenever the row is read: nothing has
to be read at the start, and what was damaged later is never used either.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_asvr.data.files import write_atomically

FORMAT = 2
HEADER_BYTES = 256
KEY_BYTES = 32
CHECK_SUM_BYTES = 4


class DamagedPartError(ValueError):
    """A part file that is not what was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowForm:
    """What one image takes in a part file.

    Attributes:
        num_patches: patches of one image.
        depth: values of one patch.
        dtype: of a value on disk.
        kind: ``code`` or ``feature``: what the values are, for names and messages.
    """

    num_patches: int
    depth: int
    dtype: np.dtype
    kind: str = "code"

    @property
    def suffix(self) -> str:
        """Ending of part files."""
        return f".{self.kind}s"

    @property
    def value_bytes(self) -> int:
        """Bytes of an image's values."""
        return self.num_patches * self.depth * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes that one image adds to a file."""
        return KEY_BYTES + CHECK_SUM_BYTES + self.value_bytes

    def file_bytes(self, name: str) -> int:
        """Size that the file of this name must have; -1 for a name that tells none."""
        number = name.removesuffix(self.suffix).rpartition("-")[2]
        return HEADER_BYTES + int(number) * self.row_bytes if number.isdecimal() else -1


class Part:
    """A part file mapped into memory; values are read when they are asked for.

    Args:
        path: of the file.
        form: of its rows.

    Attributes:
        name: of the file.
        keys: uint8 [I, 32].

    Raises:
        DamagedPartError: header, keys or check sums are not what was written.
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path, form: RowForm) -> None:
        self.name = path.name
        self._form = form
        try:
            mapped = np.memmap(path, dtype=np.uint8, mode="r")
            header = json.loads(mapped[:HEADER_BYTES].tobytes())
            images, table_sum = int(header["images"]), header["crc32"]
            same = (header["format"], header["num_patches"], header["depth"], header["dtype"])
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedPartError(f"no header: {error}") from error
        if same != (FORMAT, form.num_patches, form.depth, form.dtype.str):
            raise DamagedPartError(f"its header says {header}")
        if len(mapped) != HEADER_BYTES + images * form.row_bytes:
            raise DamagedPartError(f"{len(mapped)} bytes for {images} images")
        ends = np.cumsum([HEADER_BYTES, images * KEY_BYTES, images * CHECK_SUM_BYTES])
        if zlib.crc32(mapped[ends[0] : ends[2]]) != table_sum:
            raise DamagedPartError("the check sum of its keys differs")
        self.keys = mapped[ends[0] : ends[1]].reshape(images, KEY_BYTES)
        self._sums = mapped[ends[1] : ends[2]].view("<u4")
        self._values = mapped[ends[2] :].reshape(images, form.value_bytes)

    def row(self, number: int) -> np.ndarray:
        """Values [N, D] of one image.

        Raises:
            DamagedPartError: they are not what was written.
        """
        values = self._values[number]
        if _check_sum(self.keys[number], values) != self._sums[number]:
            raise DamagedPartError(f"the check sum of image {number} differs")
        return values.view(self._form.dtype).reshape(self._form.num_patches, self._form.depth)

    def check(self) -> None:
        """Read all of it.

        Raises:
            DamagedPartError: a row is not what was written.
        """
        for number in range(len(self.keys)):
            self.row(number)


def write_part(folder: Path, keys: Sequence[str], values_IND: np.ndarray, form: RowForm) -> None:
    """Write the values of some images as one file, whole or not at all.

    Args:
        folder: of the part files.
        keys: 64 hexadecimal digits for each image.
        values_IND: their values, any type that holds what ``form`` does.
        form: of a row.
    """
    raw = [bytes.fromhex(key) for key in keys]
    rows = np.ascontiguousarray(values_IND, dtype=form.dtype)
    sums = np.array([_check_sum(*pair) for pair in zip(raw, rows, strict=True)], dtype="<u4")
    table = b"".join(raw) + sums.tobytes()
    header = {
        "format": FORMAT,
        "images": len(keys),
        "num_patches": form.num_patches,
        "depth": form.depth,
        "dtype": form.dtype.str,
        "crc32": zlib.crc32(table),
    }
    # Padded, so that the values are aligned in memory.
    line = json.dumps(header).ljust(HEADER_BYTES - 1).encode() + b"\n"
    # Two jobs that encode the same images write the same file.
    name = f"{hashlib.sha256(table).hexdigest()[:32]}-{len(keys)}{form.suffix}"
    write_atomically(folder / name, line, table, rows.tobytes())


def _check_sum(key: bytes | np.ndarray, values: np.ndarray) -> int:
    return zlib.crc32(values.tobytes(), zlib.crc32(bytes(key)))
