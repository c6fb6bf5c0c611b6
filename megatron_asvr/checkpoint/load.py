"""Continue a run from its newest complete checkpoint."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process)

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.frozen import open_frozen
from megatron_asvr.checkpoint.identity import check_identity
from megatron_asvr.checkpoint.meta import Meta, read_meta
from megatron_asvr.checkpoint.save import layout, trained_shapes
from megatron_asvr.checkpoint.state import load_state, sharded_state
from megatron_asvr.errors import AsvrError, CheckpointError
from megatron_asvr.model.sharding import load_weights, named
from megatron_asvr.parallel.collectives import broadcast_object
from megatron_asvr.parallel.groups import Groups

logger = logging.getLogger(__name__)


def find_resume(folder: RunFolder, identity: Mapping[str, Any]) -> Meta | None:
    """What the newest complete checkpoint says, or None when the run starts anew.

    Needs no ranks and no model, so that a run that must not continue is stopped at once.

    Args:
        folder: the run's folder.
        identity: of the run that wants to continue.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another run.
    """
    step = folder.latest()
    if step is None:
        return None
    path = folder.step(step)
    meta = read_meta(path)
    check_identity(meta.identity, identity, where=str(path))
    for name in meta.frozen.values():
        open_frozen(folder.frozen / name)
    return meta


def agree_resume(folder: RunFolder, identity: Mapping[str, Any], *, groups: Groups) -> Meta | None:
    """``find_resume`` of rank 0 on every rank, so that all continue from the same step.

    Raises:
        CheckpointError: on every rank, what rank 0 found wrong.
    """
    found: Meta | AsvrError | None = None
    if groups.rank == 0:
        try:
            found = find_resume(folder, identity)
        except AsvrError as err:
            found = err
    found = broadcast_object(found, group=groups.world)
    if isinstance(found, AsvrError):
        raise found
    return found


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
    tensors = {}
    for name in meta.frozen.values():
        tensors |= open_frozen(folder.frozen / name)
    missing = load_weights(
        chunks,
        lambda name: tensors[name]() if name in tensors else None,
        groups=groups,
        strict=False,
    )
    frozen = {name for name, param in named(chunks) if not param.requires_grad}
    if lost := sorted(frozen.intersection(missing)):
        raise CheckpointError(
            f"{folder.frozen} lacks {len(lost)} weights that this run does not train, for example "
            f"{lost[0]}; train.trainable or the model differs from the run's first start"
        )


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
    try:
        state = dist_checkpointing.load(
            sharded_state(chunks, optimizer, is_loading=True), str(path)
        )
    except CheckpointingException as err:
        raise CheckpointError(f"{path} does not fit this run: {err}") from err
    load_state(state, chunks, optimizer, step=meta.resume.step)
    now = layout(groups)
    changed = [f"{k} {meta.layout.get(k)} -> {now[k]}" for k in now if meta.layout.get(k) != now[k]]
    if changed and groups.rank == 0:
        logger.warning(
            "continuing with another layout (%s): results equal the undisturbed run only up to "
            "rounding",
            ", ".join(changed),
        )


def _check_shapes(
    path: Path, saved: Mapping[str, list[int]], model: Mapping[str, list[int]]
) -> None:
    for name in sorted(saved.keys() | model.keys()):
        if saved.get(name) != model.get(name):
            raise CheckpointError(
                f"{path} belongs to another model: {name} has shape {saved.get(name)} there and "
                f"{model.get(name)} here (None: not trained)"
            )
