"""meta.json: what a checkpoint holds, and the size and SHA-256 of every file. It is written last.

So its presence means completeness, and each of its claims can be checked, those about itself too.

What a run needs to go on beside weights and optimizer is a step number, and which batches are left
out. The order of the samples is a pure function of (seed, step, batches left out), the learning
rate one of the step, initial weights of (seed, name), and nothing in a step draws random numbers:
no layer has dropout, and the augmentation of images is a function of the order. So neither
generator states nor a position in the data exist that could be lost.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from megatron_asvr.checkpoint.folder import META, write_durably
from megatron_asvr.errors import CheckpointError

FORMAT = 2


class FileFacts(TypedDict):
    """What is checked of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumeState:
    """Where a run stands: all but ``step`` are totals, and what is not logged yet."""

    step: int = 0  # optimizer steps done
    samples: int = 0
    text_targets: int = 0
    visual_targets: int = 0
    bad_samples: int = 0  # of samples: places that held nothing because an image was bad
    tokens: int = 0  # positions without padding
    data_hash: str = ""  # of all global batches so far, in order
    skipped: list[int] = dataclasses.field(default_factory=list)  # batches left out, ascending
    losses: list[float] = dataclasses.field(default_factory=list)  # that a spike is compared with
    # Linears that left 8 bits, by name: after how many steps (train/drift.py).
    left_fp8: dict[str, int] = dataclasses.field(default_factory=dict)
    train_s: float = 0.0  # seconds spent in steps, over all attempts
    elapsed_s: float = 0.0  # seconds of all attempts: steps, what is between them, what was lost
    lost_s: float = 0.0  # of these: after checkpoints that were gone back to (train/work.py)
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
    files: dict[str, FileFacts] = dataclasses.field(default_factory=dict)


def write_meta(path: Path, meta: Meta) -> None:
    """Write ``path/meta.json``; files that ``meta.files`` lacks are read for it."""
    others = [p for p in path.iterdir() if p.name != META and p.name not in meta.files]
    files = {**meta.files, **{p.name: describe(p) for p in others}}
    tree = {"format": FORMAT, **dataclasses.asdict(dataclasses.replace(meta, files=files))}
    write_durably(path / META, _text({**tree, "sha256": _own_hash(tree)}).encode())


def read_meta(path: Path) -> Meta:
    """The checked contents of ``path/meta.json``; of the files only presence and size are checked.

    Raises:
        CheckpointError: it is missing, damaged or of another format, or one of the checkpoint's
            files is missing or has another size than was written.
    """
    try:
        tree = json.loads((path / META).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} has no {META}, so it is not a complete checkpoint of this project"
        ) from None
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path / META} cannot be read: {err}") from None
    try:
        if tree.pop("format") != FORMAT:
            raise CheckpointError(f"{path / META} has another format than {FORMAT}")
        if tree.pop("sha256") != _own_hash({"format": FORMAT, **tree}):
            raise CheckpointError(f"{path / META} is damaged: its own checksum does not fit")
        meta = Meta(**{**tree, "resume": ResumeState(**tree["resume"])})
    except (AttributeError, KeyError, TypeError) as err:
        raise CheckpointError(f"{path / META} lacks a field: {err}") from None
    for name, facts in meta.files.items():
        try:
            size = (path / name).stat().st_size
        except OSError as err:
            raise CheckpointError(f"{path / name} is missing: {err.strerror}") from None
        if size != facts["bytes"]:
            raise CheckpointError(
                f"{path / name} is damaged: it has {size} bytes, but {facts['bytes']} were written"
            )
    return meta


def damage(path: Path, meta: Meta, names: Iterable[str] | None = None) -> dict[str, str]:
    """What is wrong with a checkpoint's files, by name; empty when they hold what was written.

    Args:
        path: the checkpoint.
        meta: what it says.
        names: the files to read, all of them by default.
    """
    found = {}
    for name in meta.files if names is None else names:
        try:
            same = describe(path / name) == meta.files[name]
        except OSError as err:
            found[name] = f"cannot be read: {err.strerror}"
        else:
            if not same:
                found[name] = "is damaged: its checksum does not fit"
    return found


def describe(path: Path) -> FileFacts:
    """Size and checksum of a file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": stream.tell(), "sha256": digest}


def _own_hash(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(tree).encode()).hexdigest()


def _text(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=1, sort_keys=True)
