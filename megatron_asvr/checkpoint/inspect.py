"""What the checkpoints of a run hold, for people: nothing here needs ranks or a model."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from megatron_asvr.checkpoint.folder import META, RunFolder
from megatron_asvr.checkpoint.frozen import frozen_damage
from megatron_asvr.checkpoint.meta import damage, read_meta
from megatron_asvr.checkpoint.reader import (
    find_checkpoint,
    frozen_folder,
    read_run,
    settings,
    weight_names,
)
from megatron_asvr.config.load import flatten
from megatron_asvr.errors import CheckpointError


def listing(path: Path) -> list[dict[str, Any]]:
    """Step, size, time of writing and problem (None without one) of a run's checkpoints, by step.

    Sizes of files are compared with what was written; checksums are not (see ``verified``).

    Raises:
        CheckpointError: the folder has no checkpoint, not even a damaged one.
    """
    folder = _run_folder(path)
    rows = []
    for step in folder.candidates():
        place = folder.step(step)
        problem = None
        try:
            read_meta(place)
        except CheckpointError as err:
            problem = str(err)
        rows.append(_row(step, place, problem))
    rows += [
        _row(int(place.name.split("_")[2]), place, f"set aside as {place.name}")
        for place in folder.damaged()
    ]
    if not rows:
        raise CheckpointError(f"{path} has no checkpoint in {folder.checkpoints}")
    return sorted(rows, key=lambda row: row["step"])


def contents(path: Path) -> dict[str, Any]:
    """What one checkpoint holds: totals, layout, files, and weights by part.

    Args:
        path: a checkpoint, or a run folder for its newest.

    Raises:
        CheckpointError: there is none.
    """
    place = find_checkpoint(path)
    meta = read_meta(place)
    trained: dict[str, int] = {}
    for name, shape in meta.trained.items():
        part = name.partition(".")[0]
        trained[part] = trained.get(part, 0) + math.prod(shape)
    resume = meta.resume
    return {
        "path": str(place),
        "step": resume.step,
        "samples": resume.samples,
        "text_targets": resume.text_targets,
        "visual_targets": resume.visual_targets,
        "tokens": resume.tokens,
        "train_s": resume.train_s,
        "layout": meta.layout,
        "trained parameters": trained,
        "frozen": meta.frozen,
        "files": {name: facts["bytes"] for name, facts in sorted(meta.files.items())},
    }


def verified(path: Path, *, every: bool = False) -> list[dict[str, Any]]:
    """Path, number of files and problems of checkpoints, after reading every byte of them.

    Args:
        path: a checkpoint, or a run folder for its newest.
        every: all checkpoints of the run instead.

    Raises:
        CheckpointError: there is none.
    """
    if every:
        folder = _run_folder(path)
        places = [folder.step(step) for step in folder.candidates()]
    else:
        places = [find_checkpoint(path)]
    if not places:
        raise CheckpointError(f"{path} has no checkpoint in {folder.checkpoints}")
    return [_verify(place) for place in places]


def differences(one: Path, other: Path) -> dict[str, Any]:
    """How two checkpoints differ: ``settings``, ``weights`` by name, and how many are ``equal``.

    Raises:
        CheckpointError: a checkpoint is missing or damaged.
    """
    places = [find_checkpoint(one), find_checkpoint(other)]
    metas = [read_meta(place) for place in places]
    changed = _different(
        *(_plain(flatten(settings(*of))) for of in zip(places, metas, strict=True))
    )
    weights: dict[str, str] = {}
    (_, mine), (_, theirs) = (read_run(place) for place in places)
    names = sorted({*weight_names(places[0]), *weight_names(places[1])})
    for name in names:
        a, b = mine(name), theirs(name)
        if a is None or b is None:
            weights[name] = f"only in {places[a is None]}"
        elif a.shape != b.shape:
            weights[name] = f"{tuple(a.shape)} against {tuple(b.shape)}"
        elif not torch.equal(a.float(), b.float()):
            largest = float((a.double() - b.double()).abs().max())
            weights[name] = f"largest difference {largest:.3e}"
    return {"settings": changed, "weights": weights, "equal": len(names) - len(weights)}


def pruned(
    path: Path, *, keep: int | None, keep_every: int | None, dry_run: bool
) -> dict[str, Any]:
    """What a policy let go: paths it ``deleted``, and the step that is ``newest_verified``.

    Args:
        path: a run folder.
        keep: newest ones to keep; None: as the newest checkpoint's run was set.
        keep_every: also keep the multiples of it; None likewise.
        dry_run: delete nothing.

    Raises:
        CheckpointError: no checkpoint verifies, so nothing may be deleted.
    """
    folder = _run_folder(path)
    newest = next(
        (s for s in reversed(folder.steps()) if not _verify(folder.step(s))["problems"]), -1
    )
    if newest < 0:
        raise CheckpointError(
            f"no checkpoint of {path} verifies, so none is deleted; `asvr checkpoint verify --all` "
            "says what is wrong"
        )
    train = read_meta(folder.step(newest)).config["train"]
    doomed = folder.doomed(
        train["keep_checkpoints"] if keep is None else keep,
        train["keep_every_steps"] if keep_every is None else keep_every,
        protect=[newest],
    )
    places = [*(folder.step(step) for step in doomed), *folder.damaged()]
    for place in [] if dry_run else places:
        folder.delete(place)
    return {
        "deleted": [str(place) for place in places],
        "dry_run": dry_run,
        "newest_verified": newest,
    }


def _run_folder(path: Path) -> RunFolder:
    """The run of a path that may be one of its checkpoints."""
    return RunFolder(path.parent.parent if (path / META).is_file() else path)


def _row(step: int, place: Path, problem: str | None) -> dict[str, Any]:
    time = datetime.fromtimestamp(place.stat().st_mtime, UTC)
    return {
        "step": step,
        "bytes": sum(file.stat().st_size for file in place.iterdir()),
        "written": time.isoformat(sep=" ", timespec="seconds"),
        "problem": problem,
    }


def _verify(place: Path) -> dict[str, Any]:
    report: dict[str, Any] = {"path": str(place), "files": 0, "problems": []}
    try:
        meta = read_meta(place)
    except CheckpointError as err:
        return {**report, "problems": [str(err)]}
    problems = [f"{name} {what}" for name, what in damage(place, meta).items()]
    frozen = {name: frozen_damage(frozen_folder(place) / name) for name in meta.frozen.values()}
    problems += [f"frozen/{name} {what}" for name, what in frozen.items() if what is not None]
    return {**report, "files": len(meta.files) + len(meta.frozen), "problems": problems}


def _different(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, list[Any]]:
    keys = sorted(mine.keys() | theirs.keys())
    return {k: [mine.get(k), theirs.get(k)] for k in keys if mine.get(k) != theirs.get(k)}


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON has them."""
    return {key: list(x) if isinstance(x, tuple) else x for key, x in settings.items()}
