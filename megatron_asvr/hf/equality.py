"""The proof that a folder holds the weights it was made from, to the byte.

Nothing of what wrote the folder is asked: it is opened as a stranger's, by what reads folders, and
its tensors are joined to ours, where an export splits ours. Both sides are read a few megabytes at
a time, so a model of any size is compared in little memory.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_asvr.config.schema import ModelConfig
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf import stock, tables
from megatron_asvr.hf.importer import read_folder
from megatron_asvr.hf.memory import in_memory
from megatron_asvr.hf.resolution import same_images
from megatron_asvr.hf.source import Source, parts_of
from megatron_asvr.hf.stream import flat_chunks, run_all
from megatron_asvr.parallel.stored import Stored

SHOWN = 5
CODEBOOKS = f"{tables.HEAD}codebooks."  # searched in fp32, so they stay that


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What a folder was made from.

    Attributes:
        name: for messages.
        model: settings of the model.
        tensors: full tensors by our global name.
        checks: see ``checkpoint.reader.Weights``.
    """

    name: str
    model: ModelConfig
    tensors: Mapping[str, Stored]
    checks: tuple[Callable[[], None], ...] = ()


@dataclass(slots=True)
class _Found:
    """What the comparison has found so far."""

    num_equal: int = 0
    num_bytes: int = 0
    mismatches: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


def compare(folder: str | Path, origin: Origin, *, dtype: torch.dtype | None = None) -> dict:
    """A report with ``ok``, what was compared, and the first mismatches in words.

    Args:
        folder: as an export or an import wrote it.
        origin: what it was written from.
        dtype: that the weights must be stored in; by default that of ``config.json``, and for an
            imported folder that of the origin.

    Raises:
        AsvrError: a file of the origin is damaged.
    """
    started = time.monotonic()
    found = _Found()
    try:
        source = _opened(Path(folder), origin)
        wanted = dtype or (None if source.kind == "asvr" else stock.read_hf_config(folder).dtype)
    except ConversionError as e:
        found.mismatches[str(folder)] = str(e)
        names: list[str] = []
    else:
        names = source.names
        tasks = (partial(_compare, n, origin.tensors[n], source, wanted, found) for n in names)
        run_all([*origin.checks, *tasks])
    ordered = [found.mismatches[n] for n in [str(folder), *names] if n in found.mismatches]
    seconds = time.monotonic() - started
    return {
        "ok": not ordered,
        "folder": str(folder),
        "against": origin.name,
        "num_tensors": len(origin.tensors),
        "num_tensors_compared": len(names),
        "num_tensors_equal": found.num_equal,
        "share_compared": len(names) / max(1, len(origin.tensors)),
        "num_bytes_compared": found.num_bytes,
        "num_mismatches": len(ordered),
        "mismatches": ordered[:SHOWN],
        "seconds": round(seconds, 2),
    }


def require_equal(report: Mapping[str, Any], what: str) -> None:
    """Return when ``report`` of `compare` is good.

    Raises:
        ConversionError: with the first offenders and the counts.
    """
    if not report["ok"]:
        raise ConversionError(
            f"{what}: {report['num_mismatches']} mismatches, {report['num_tensors_equal']} of "
            f"{report['num_tensors']} tensors are equal: {'; '.join(report['mismatches'])}"
        )


def _opened(folder: Path, origin: Origin) -> Source:
    """The folder, after its names, shapes and settings were found to be those of the origin."""
    source = read_folder(folder)
    got = {name: rule.shape for name, rule in source.rules.items()}
    wanted = {name: tensor.shape for name, tensor in origin.tensors.items()}
    tables.check_complete(f"{folder} against {origin.name}", got, wanted)
    source.check_fits(origin.model, parts_of(source.names))
    ours, theirs = origin.model.resolution, source.model.resolution
    if source.holds("projector") and not same_images(ours, theirs):
        raise ConversionError(f"{folder} sees images by {theirs}; wanted {ours}")
    if source.kind != "asvr":
        _check_stock(source)
    return source


def _check_stock(source: Source) -> None:
    """Return when a folder fills the model of transformers that its ``config.json`` describes."""
    if source.ignored:
        raise ConversionError(f"{source.path}: no model needs {', '.join(source.ignored[:SHOWN])}")
    config = stock.read_hf_config(source.path)
    (architecture,) = config.architectures
    body = [rule for name, rule in source.rules.items() if not name.startswith(tables.HEAD)]
    llava = architecture not in stock.TEXT_ARCHITECTURES.values()
    got = in_memory(tables.source_shapes(body), llava=llava)
    where = f"{source.path} against {architecture} of transformers"
    tables.check_complete(where, got, stock.stock_shapes(architecture, config))


def _compare(
    name: str, tensor: Stored, source: Source, dtype: torch.dtype | None, found: _Found
) -> None:
    """Compare one of our tensors with its parts in the folder."""
    wanted = torch.float32 if name.startswith(CODEBOOKS) and dtype else dtype or tensor.dtype
    parts = [part for part, _ in source.rules[name].parts]
    kinds = {source.stored[part].dtype for part in parts}
    problem = None
    if kinds != {wanted}:
        problem = f"is stored as {sorted(map(str, kinds))}; wanted {wanted}"
    elif different := _num_different(tensor, source.open(name)):
        problem = f"{different} of {torch.Size(tensor.shape).numel()} numbers differ"
    size = sum(source.stored[part].num_bytes for part in parts)
    with found.lock:
        if problem is None:
            found.num_equal += 1
        else:
            found.mismatches[name] = f"{name} ({', '.join(parts)}): {problem}"
        found.num_bytes += size


def _num_different(ours: Stored, theirs: Stored) -> int:
    """How many numbers differ in any bit, once ours have the type of theirs."""
    different = 0
    for _, (a, b) in flat_chunks(ours, theirs):
        a, b = _bytes(a.to(b.dtype)), _bytes(b)
        if not _same(a, b):
            rows = (a != b).view(-1, theirs.dtype.itemsize)
            different += int(rows.any(-1).sum())
    return different


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two rows of bytes are equal, eight at a time."""
    whole = a.numel() // 8 * 8
    wide = (x[:whole].view(torch.int64) for x in (a, b))
    return torch.equal(*wide) and torch.equal(a[whole:], b[whole:])


def origin_of(source: Source) -> Origin:
    """A folder, as what another was made from."""
    tensors = {name: source.open(name) for name in source.names}
    return Origin(name=str(source.path), model=source.model, tensors=tensors)
