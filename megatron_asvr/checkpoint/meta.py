"""meta.json: what a checkpoint holds, written last, so its presence means completeness."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_asvr.checkpoint.folder import META, write_durably
from megatron_asvr.errors import CheckpointError

FORMAT = 1
_HASHED_BYTES = 1 << 20  # larger files are checked by size; hashing them would delay a start


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeState:
    """Where a run stands, beside its weights and its optimizer.

    Sample order is a pure function of (seed, step) and no layer draws random numbers, so a step
    number is all that continuing needs; the rest are totals and what is not logged yet.
    """

    step: int = 0  # optimizer steps done
    samples: int = 0
    text_targets: int = 0
    visual_targets: int = 0
    tokens: int = 0  # positions without padding
    train_s: float = 0.0  # seconds spent in steps, over all attempts
    window: dict[str, Any] = dataclasses.field(default_factory=dict)  # train/metrics.py


@dataclass(frozen=True, kw_only=True, slots=True)
class Meta:
    """Contents of meta.json."""

    resume: ResumeState
    config: dict[str, Any]  # the whole configuration, plain values
    identity: dict[str, Any]  # what a continuation must have in common, see identity.py
    layout: dict[str, Any]  # parallel degrees and versions at the time of writing
    trained: dict[str, list[int]]  # canonical name -> full shape, without padding
    frozen: dict[str, str]  # part -> file in frozen/
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def write_meta(path: Path, meta: Meta) -> None:
    """Write ``path/meta.json`` with the sizes of all files already there."""
    files = {p.name: _describe(p) for p in sorted(path.iterdir()) if p.name != META}
    tree = {"format": FORMAT, **dataclasses.asdict(dataclasses.replace(meta, files=files))}
    write_durably(path / META, json.dumps(tree, indent=1, sort_keys=True).encode())


def read_meta(path: Path) -> Meta:
    """The checked contents of ``path/meta.json``.

    Raises:
        CheckpointError: it is missing, damaged or of another format, or one of the checkpoint's
            files is missing or differs from what was written.
    """
    try:
        tree = json.loads((path / META).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} has no {META}, so it is not a complete checkpoint of this project"
        ) from None
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path / META} cannot be read: {err}. {_way_out(path)}") from None
    try:
        if tree.pop("format") != FORMAT:
            raise CheckpointError(f"{path / META} has another format than {FORMAT}")
        meta = Meta(**{**tree, "resume": ResumeState(**tree["resume"])})
    except (AttributeError, KeyError, TypeError) as err:
        raise CheckpointError(f"{path / META} lacks a field: {err}. {_way_out(path)}") from None
    for name, wanted in meta.files.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing. {_way_out(path)}")
        got = _describe(path / name)
        if got != wanted:
            raise CheckpointError(
                f"{path / name} is damaged: it is {got}, but {wanted} was written. {_way_out(path)}"
            )
    return meta


def _describe(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _HASHED_BYTES:
        return {"bytes": size}
    return {"bytes": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _way_out(path: Path) -> str:
    return f"Delete {path} to continue from the checkpoint before it"
