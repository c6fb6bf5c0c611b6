"""Read the weights of a finished or running run, tensor by tensor, without building its model."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from megatron_asvr.checkpoint.folder import META, RunFolder
from megatron_asvr.checkpoint.frozen import frozen_damage, open_frozen
from megatron_asvr.checkpoint.index import master_weights, open_index
from megatron_asvr.checkpoint.meta import Meta, damage, read_meta
from megatron_asvr.config.load import from_dict
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import CheckpointError, ConfigError
from megatron_asvr.parallel.stored import Check, Stored


class Weights:
    """The weights of a checkpoint; calling it with a canonical name gives the full tensor or None.

    A call verifies a file before it takes the first tensor from it. Whoever reads ``stored`` itself
    trusts nothing before all ``checks`` have been called.

    Attributes:
        stored: every weight by canonical name, without padding, in the type it was trained in.
        checks: functions, each of which reads one file and raises CheckpointError if it is damaged.
        checks_of: those of the files that a weight lies in, by its name.
    """

    def __init__(self) -> None:
        self.stored: dict[str, Stored] = {}
        self.checks: list[Check] = []
        self.checks_of: dict[str, list[Check]] = {}

    def add(self, tensors: Mapping[str, Stored], check: Check) -> None:
        """Add tensors, or parts of them, that lie in the file of ``check``."""
        self.stored |= tensors
        self.checks.append(check)
        for name in tensors:
            self.checks_of.setdefault(name, []).append(check)

    def __call__(self, name: str) -> Tensor | None:
        """The full tensor called ``name``, on the CPU, or None."""
        if name not in self.stored:
            return None
        for check in self.checks_of[name]:
            check()
        return self.stored[name].read()


def read_run(path: str | Path, *, masters: bool = False) -> tuple[Config, Weights]:
    """A run's configuration, and its weights, which are read when asked for.

    Args:
        path: a run folder (its newest checkpoint is read) or one of its checkpoints.
        masters: give the optimizer's fp32 weights, of which those of the model are roundings, where
            there are any. Weights of 8 bits are always taken from them.

    Raises:
        CheckpointError: there is no complete checkpoint, a file of it is missing, it holds weights
            of 8 bits alone, or another version wrote it, with settings that are unknown here.
    """
    step = find_checkpoint(Path(path))
    meta = read_meta(step)
    weights = Weights()
    if meta.trained:
        _add_trained(weights, step, meta, masters)
    for name in meta.frozen.values():
        file = frozen_folder(step) / name
        weights.add(open_frozen(file), Check(partial(_check_frozen, file)))
    return settings(step, meta), weights


def settings(step: Path, meta: Meta) -> Config:
    """The configuration of the run that wrote a checkpoint.

    Raises:
        CheckpointError: another version wrote it, with settings that are unknown here.
    """
    try:
        return from_dict(meta.config)
    except ConfigError as err:
        raise CheckpointError(
            f"{step / META} has settings that this version does not know: {err}; read it with the "
            "version that wrote it"
        ) from err


def weight_names(step: Path) -> list[str]:
    """Canonical names of all weights of a checkpoint, those that are not trained too."""
    meta = read_meta(step)
    frozen = [
        name for file in meta.frozen.values() for name in open_frozen(frozen_folder(step) / file)
    ]
    return sorted({*meta.trained, *frozen})


def frozen_folder(step: Path) -> Path:
    """Where the weights lie that the run of a checkpoint does not train."""
    return step / "../../frozen"


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest one of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    if (path / META).is_file():
        return path
    folder = RunFolder(path)
    latest = folder.latest()
    if latest is None:
        raise CheckpointError(
            f"{path} is neither a complete checkpoint nor a run folder with one; wanted a folder "
            f"with {META}, or with {folder.checkpoints.name}/step_N/{META}"
        )
    return folder.step(latest)


def _check_frozen(path: Path) -> None:
    if (problem := frozen_damage(path)) is not None:
        raise CheckpointError(f"{path} {problem}; restore it from a copy")


def _check_trained(step: Path, meta: Meta, file: str) -> None:
    if problems := damage(step, meta, [file]):
        raise CheckpointError(f"{step / file} {problems[file]}; use another checkpoint")


def _trained(step: Path, meta: Meta, masters: bool) -> dict[str, Stored]:
    index = open_index(step)
    missing = [name for name in meta.trained if name not in index]
    if missing:
        raise CheckpointError(f"{step} promises {missing[0]} in its {META} but does not hold it")
    exact, found = master_weights(index), {}
    for name, shape in meta.trained.items():
        tiled, is_8bit = index[name], index[name].dtype.itemsize == 1
        if is_8bit and name not in exact:
            raise CheckpointError(
                f"{step} holds {name} in {tiled.dtype} and no fp32 master weight of it, so that "
                "it cannot be read exactly; take a checkpoint with its optimizer state"
            )
        if is_8bit or masters:
            tiled = exact.get(name, tiled)
        found[name] = tiled.region((0,) * len(shape), tuple(shape))  # cuts padded vocabularies
    return found


def _add_trained(weights: Weights, step: Path, meta: Meta, masters: bool) -> None:
    tensors = _trained(step, meta, masters)
    by_file: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        for part in tensor.parts:
            by_file.setdefault(Path(part.file).name, {})[name] = tensor
    for file in sorted(by_file, key=lambda name: -meta.files[name]["bytes"]):  # longest first
        weights.add(by_file[file], Check(partial(_check_trained, step, meta, file)))
