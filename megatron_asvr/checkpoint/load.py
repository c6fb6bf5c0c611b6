"""Continue a run from its newest checkpoint that verifies."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process)

from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from torch import nn
from torch.distributed import ProcessGroup

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.frozen import frozen_damage, open_frozen
from megatron_asvr.checkpoint.identity import check_identity, engine
from megatron_asvr.checkpoint.meta import Meta, damage, read_meta
from megatron_asvr.checkpoint.read import read
from megatron_asvr.checkpoint.save import trained_shapes
from megatron_asvr.checkpoint.state import parts, set_step, trained_numbers
from megatron_asvr.errors import CheckpointError
from megatron_asvr.model.sharding import load_shared
from megatron_asvr.parallel.collectives import gather_objects, on_first
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.stored import Stored
from megatron_asvr.precision.fp8.emulator import STATE
from megatron_asvr.precision.fp8.weights import fill


@dataclass(frozen=True, slots=True)
class Resume:
    """What a start continues from.

    Attributes:
        meta: of the newest checkpoint that holds what was written; None when the run starts anew.
        skipped: why newer ones cannot be used, by step, the newest first.
    """

    meta: Meta | None = None
    skipped: dict[int, str] = field(default_factory=dict)


def find_resume(
    folder: RunFolder, identity: Mapping[str, Any], *, group: ProcessGroup | None = None
) -> Resume:
    """The newest checkpoint whose files all hold what was written, the same on every rank.

    Every rank of the group reads its part of the files.

    Args:
        folder: the run's folder.
        identity: of the run that wants to continue.
        group: all ranks; None: this process alone.

    Raises:
        CheckpointError: on every rank: the checkpoint belongs to another run, or none is whole.
    """
    skipped: dict[int, str] = {}
    for step in reversed(on_first(folder.candidates, group=group)):
        path = folder.step(step)
        found = on_first(functools.partial(_open, path, identity), group=group)
        if isinstance(found, Meta):
            problems = _problems(path, found, group)
            if not problems:
                return Resume(found, skipped)
            name, problem = problems[0]
            more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
            found = f"{path / name} {problem}{more}"
        skipped[step] = found
    if skipped:
        raise CheckpointError(
            f"no checkpoint of {folder.root} can be used: {'; '.join(skipped.values())}. Restore "
            f"one from a copy, or delete {folder.checkpoints} to start the run again"
        )
    return Resume()


def require_same_run(folder: RunFolder, identity: Mapping[str, Any]) -> None:
    """Return when the newest readable checkpoint of a folder, if any, is of the run ``identity``.

    Raises:
        CheckpointError: it is another run's, or made with settings that change results.
    """
    for step in reversed(folder.candidates()):
        if isinstance(_open(folder.step(step), identity), Meta):
            return


def _open(path: Path, identity: Mapping[str, Any]) -> Meta | str:
    """What the checkpoint says, or why it cannot be used."""
    try:
        meta = read_meta(path)
    except CheckpointError as err:
        return str(err)
    check_identity(meta.identity, identity, where=str(path))
    return meta


def _problems(path: Path, meta: Meta, group: ProcessGroup | None) -> list[tuple[str, str]]:
    """Files that do not hold what was written, each read by one rank of the group."""
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    names = sorted(meta.files, key=lambda name: meta.files[name]["bytes"], reverse=True)
    shares = gather_objects(damage(path, meta, names[rank::size]), group=group)
    return [item for share in shares for item in share.items()]


def damaged_frozen(folder: RunFolder, meta: Meta, *, group: ProcessGroup) -> list[str]:
    """Files of ``frozen/`` that are missing or hold other weights than their names say.

    All ranks of the group take part, and each reads its part of the files.
    """
    names = sorted(meta.frozen.values())[group.rank() :: group.size()]
    mine = [name for name in names if frozen_damage(folder.frozen / name) is not None]
    return [name for share in gather_objects(mine, group=group) for name in share]


def load_frozen(
    folder: RunFolder, meta: Meta, chunks: Sequence[nn.Module], *, groups: Groups
) -> None:
    """Fill the weights that are not trained from ``frozen/``.

    Args:
        folder: the run's folder.
        meta: of the checkpoint to continue from.
        chunks: the bare model of this rank.
        groups: process groups of the layout.

    Raises:
        CheckpointError: a file is missing, or the weights are another model's.
    """
    files = [folder.frozen / name for name in meta.frozen.values()]
    weights = on_first(functools.partial(_open_all, files), group=groups.world)

    def frozen(_: str, parameter: nn.Parameter) -> bool:
        return not parameter.requires_grad

    if lost := load_shared(chunks, weights, groups=groups, only=frozen, strict=False):
        raise CheckpointError(
            f"{folder.frozen} lacks {len(lost)} weights that this run does not train, for example "
            f"{lost[0]}; train.trainable or the model differs from the run's first start"
        )


def _open_all(files: Sequence[Path]) -> dict[str, Stored]:
    return {name: x for file in files for name, x in open_frozen(file).items()}


def load_trained(
    folder: RunFolder,
    meta: Meta,
    chunks: Sequence[nn.Module],
    optimizer: MegatronOptimizer,
    *,
    groups: Groups,
) -> None:
    """Fill the trained weights and the optimizer from the checkpoint of ``meta``.

    Args:
        folder: the run's folder.
        meta: of the checkpoint to continue from.
        chunks: the bare model of this rank; the optimizer was made from it.
        optimizer: megatron-core's optimizer.
        groups: process groups of the layout.

    Raises:
        CheckpointError: the checkpoint holds other tensors than the model.
    """
    path = folder.step(meta.resume.step)
    _check_shapes(path, meta.trained, trained_shapes(chunks, groups=groups))
    numbers = trained_numbers(chunks)
    held = parts(chunks, optimizer, numbers)
    if not has_scales(meta):
        held = [part for part in held if not part.key.startswith(STATE)]
    read(held, path, group=groups.world)
    for param, kept in numbers.items():
        if is_float8tensor(param):
            fill(param, kept)
    set_step(optimizer, meta.resume.step)


def has_scales(meta: Meta) -> bool:
    """Whether a checkpoint was written by the emulation, with all that its products know."""
    return bool(engine(meta.config)["precision.fp8.emulate"])


def _check_shapes(
    path: Path, saved: Mapping[str, list[int]], model: Mapping[str, list[int]]
) -> None:
    for name in sorted(saved.keys() | model.keys()):
        if saved.get(name) != model.get(name):
            raise CheckpointError(
                f"{path} belongs to another model: {name} has shape {saved.get(name)} there and "
                f"{model.get(name)} here (None: not trained)"
            )
