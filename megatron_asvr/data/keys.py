"""Where each image's values lie in the part files of a cache: sorted keys, mapped into memory."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_asvr.data.files import read_table, write_table
from megatron_asvr.data.parts import KEY_BYTES

_KEY = np.dtype(f"S{KEY_BYTES}")


class KeyIndex:
    """Sorted keys (bytes of 32, each once) with the number of their part and their row in it.

    Args:
        keys: bytes of 32.
        parts: number of each key's part.
        rows: of each key in its part.
    """

    def __init__(self, keys: np.ndarray, parts: np.ndarray, rows: np.ndarray) -> None:
        self.keys, self.parts, self.rows = keys, parts, rows

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Place of every key in the index, -1 where there is none: int64 [I]."""
        if not len(keys):
            return np.empty(0, np.int64)
        wanted = np.frombuffer(b"".join(map(bytes.fromhex, keys)), dtype=_KEY)
        places = np.searchsorted(self.keys, wanted)
        there = places < len(self.keys)
        there[there] = self.keys[places[there]] == wanted[there]
        return np.where(there, places, -1)

    def write(self, path: Path) -> None:
        """Write it as an Arrow file."""
        keys = pa.py_buffer(np.ascontiguousarray(self.keys))
        column = pa.Array.from_buffers(pa.binary(KEY_BYTES), len(self.keys), [None, keys])
        columns = {"key": column, "part": pa.array(self.parts), "row": pa.array(self.rows)}
        write_table(path.parent, pa.table(columns), path.stem)


def index_of(parts: Sequence[np.ndarray]) -> KeyIndex:
    """The index of parts with these keys, uint8 [I, 32] each."""
    if not parts:
        return KeyIndex(np.empty(0, _KEY), np.empty(0, np.uint32), np.empty(0, np.uint32))
    keys = np.concatenate(parts).view(_KEY).reshape(-1)
    numbers = np.repeat(np.arange(len(parts), dtype=np.uint32), [len(part) for part in parts])
    rows = np.concatenate([np.arange(len(part), dtype=np.uint32) for part in parts])
    order = np.argsort(keys, kind="stable")
    first = np.append(True, keys[order][1:] != keys[order][:-1])
    chosen = order[first]
    return KeyIndex(keys[chosen], numbers[chosen], rows[chosen])


def read_index(path: Path) -> KeyIndex | None:
    """An index file mapped into memory, or None when it is absent or damaged."""
    table = read_table(path)
    if table is None or table.num_rows == 0:
        return None
    (keys,), (parts,), (rows,) = (
        table.combine_chunks().column(name).chunks for name in ("key", "part", "row")
    )
    found = np.frombuffer(keys.buffers()[1], dtype=_KEY, count=len(keys))
    return KeyIndex(found, parts.to_numpy(), rows.to_numpy())
