"""Read the weights of a finished or running run, tensor by tensor, without building its model."""

import functools
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from megatron_asvr.checkpoint.folder import META, RunFolder
from megatron_asvr.checkpoint.frozen import frozen_damage, open_frozen
from megatron_asvr.checkpoint.meta import Meta, damage, read_meta
from megatron_asvr.config.load import from_dict
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import CheckpointError

# Each rank reads for itself (``no_dist``), which torch takes for an oversight.
warnings.filterwarnings("ignore", r"torch\.distributed is .* to load in a single process")


def read_run(path: str | Path) -> tuple[Config, Callable[[str], Tensor | None]]:
    """A run's configuration, and a function from canonical name to full tensor.

    The function returns None for a name that the run does not have. Tensors are read when asked
    for, on the CPU, in the type they were trained in, without padding. A file is verified before
    the first tensor is taken from it; the function raises CheckpointError when it is damaged.

    Args:
        path: a run folder (its newest checkpoint is read) or one of its checkpoints.

    Raises:
        CheckpointError: there is no complete checkpoint, or a file of it is missing.
    """
    step = find_checkpoint(Path(path))
    meta = read_meta(step)
    tensors: dict[str, Callable[[], Tensor]] = {}
    for name in meta.frozen.values():
        tensors |= _frozen_tensors(frozen_folder(step) / name)
    tensors |= _trained_tensors(step, meta)

    def get(name: str) -> Tensor | None:
        read = tensors.get(name)
        return read() if read is not None else None

    return from_dict(meta.config), get


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


def _frozen_tensors(path: Path) -> dict[str, Callable[[], Tensor]]:
    @functools.cache
    def verify() -> None:
        if (problem := frozen_damage(path)) is not None:
            raise CheckpointError(f"{path} {problem}; restore it from a copy")

    def reading(read: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: (verify(), read())[1]

    return {name: reading(read) for name, read in open_frozen(path).items()}


def _trained_tensors(step: Path, meta: Meta) -> dict[str, Callable[[], Tensor]]:
    if not meta.trained:
        return {}
    reader = SafeReader(step)
    stored = reader.read_metadata().state_dict_metadata
    files: dict[str, set[str]] = {}
    for index, place in reader.read_metadata().storage_data.items():
        files.setdefault(index.fqn, set()).add(place.relative_path)

    @functools.cache
    def verify(file: str) -> None:
        if problems := damage(step, meta, [file]):
            raise CheckpointError(f"{step / file} {problems[file]}; use another checkpoint")

    missing = [name for name in meta.trained if name not in stored]
    if missing:
        raise CheckpointError(f"{step} promises {missing[0]} in its {META} but does not hold it")

    def reading(name: str, shape: list[int]) -> Callable[[], Tensor]:
        entry = stored[name]

        def read() -> Tensor:
            assert isinstance(entry, TensorStorageMetadata)
            for file in files[name]:
                verify(file)
            full = torch.empty(entry.size, dtype=entry.properties.dtype)
            load({name: full}, storage_reader=reader, no_dist=True)
            return full[tuple(slice(size) for size in shape)]  # cut the padding of vocabularies

        return read

    return {name: reading(name, shape) for name, shape in meta.trained.items()}


class SafeReader(FileSystemReader):
    """torch's reader of a distributed checkpoint, for folders that others may have written.

    The tensors themselves are read with ``weights_only``; the index beside them is a pickle, so
    it is unpickled here with nothing but the index's own classes allowed, and once.
    """

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the checkpoint.

        Raises:
            CheckpointError: it is missing, damaged or names foreign classes.
        """
        if self._index is None:
            path = Path(self.path) / ".metadata"
            try:
                self._index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
            except (OSError, EOFError, pickle.UnpicklingError, AttributeError, IndexError) as err:
                raise CheckpointError(f"{path} cannot be read: {err}") from None
            self._index.storage_meta = self._index.storage_meta or StorageMeta()
        self._index.storage_meta.load_id = self.load_id
        return self._index


# What an index consists of: classes defined in these modules, and a few names beside dtypes.
_INDEX_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
)
_INDEX_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "dict"),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """One of the index's own classes or a dtype.

        Raises:
            pickle.UnpicklingError: anything else.
        """
        if module in _INDEX_MODULES:
            found = super().find_class(module, name)
            # A class defined there, not one of the many things those modules import.
            if isinstance(found, type) and found.__module__ == module:
                return found
        if (module, name) in _INDEX_NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index needs")
