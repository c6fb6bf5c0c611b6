"""One number for every position and module output, comparable between layouts.

A module's output at a position is projected onto a fixed random vector, drawn from the module's
name. The number is stored under (sample, place in the sample), which no layout changes: not the
rank that holds the column, nor the micro-batch, nor the packed row. So two runs of the same samples
can be laid side by side, and the first module whose numbers differ is where they part.

What ranks of a tensor-parallel group hold alike is kept once for each of them and must agree with
the reference on all.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from megatron_asvr.batch import NO_POSITION, MicroBatch
from megatron_asvr.model.asvr import AsvrModel, LossSums
from megatron_asvr.model.sharding import generator_of
from megatron_asvr.parallel.groups import Groups

TOKENS, TEXT_TARGETS, CODES = "tokens", "text targets", "target codes"
FEATURES = "vision_encoder"

# Modules whose output has the full width on every rank: along the sequence, ...
_SEQUENCE = re.compile(
    r"language_model\.(embedding|decoder\.(final_layernorm|layers\.\d+(\.self_attention|\.mlp)?))"
)
# ... and at the visual targets, for each depth but in the projector.
_HEAD = re.compile(r"visual_head\.(projector|norm|layers\.\d+(\.attention|\.mlp)?)")
_PADDING = -1
_PLACES = 2**32  # a key is sample * _PLACES + place


@dataclass(slots=True)
class Probe:
    """The numbers of one module's output.

    Attributes:
        keys: int64 [n], sample * 2**32 + place in it.
        values: fp64 [n, d].
        norms: fp64 [n, d], length of each projected vector; 0 for values that must be equal.
    """

    keys: np.ndarray
    values: np.ndarray
    norms: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["Probe"]) -> "Probe":
        """All of them, each key once: rows of one key (copies of a sample) are added up."""
        keys, rows = np.unique(np.concatenate([p.keys for p in parts]), return_inverse=True)
        sums = []
        for column in ("values", "norms"):
            found = np.concatenate([getattr(p, column) for p in parts])
            total = np.zeros((len(keys), *found.shape[1:]))
            np.add.at(total, rows, found)
            sums.append(total)
        return cls(keys, *sums)


@dataclass(kw_only=True, slots=True)
class Recorder:
    """Records the outputs of a rank's forward passes inside its ``with`` block.

    Args:
        chunks: this rank's model.
        groups: process groups of the layout.
        samples: ids of the global batch's samples, each once.
    """

    chunks: Sequence[AsvrModel]
    groups: Groups
    samples: Sequence[str]
    _parts: dict[str, list[Probe]] = field(default_factory=dict)
    _batch: "_Places | None" = None  # None outside a chunk's forward: recomputation is not read
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> "Recorder":
        numbers = {name: number for number, name in enumerate(self.samples)}
        for chunk in self.chunks:
            self._hook(chunk, numbers)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def save(self, path: Path) -> None:
        """Write what was recorded."""
        tensors, names = {}, []
        for name, parts in self._parts.items():
            probe = Probe.join(parts)
            for column in ("keys", "values", "norms"):
                tensors[f"{len(names)}.{column}"] = getattr(probe, column)
            scattered = self.groups.plan.sp and name.startswith("language_model.decoder")
            names.append((name, 0 if scattered else self.groups.tp_rank))
        save_file(tensors, path, metadata={"names": json.dumps(names)})

    def _hook(self, chunk: AsvrModel, numbers: Mapping[str, int]) -> None:
        def begin(_: nn.Module, args: tuple[MicroBatch]) -> None:
            (batch,) = args
            self._batch = _Places.of(batch, numbers, self.groups)
            if chunk.pre_process:
                self._exact(TOKENS, self._batch.columns, _by_column(batch.tokens_BS))
            if chunk.post_process:
                targets_BS = batch.text_targets_BS
                self._exact(TEXT_TARGETS, self._batch.columns, _by_column(targets_BS))

        def end(_: nn.Module, __: tuple[MicroBatch], output: Any) -> None:
            sums = output[-1] if isinstance(output, tuple) else output
            if isinstance(sums, LossSums) and sums.codes_MD is not None:
                self._exact(CODES, self._batch.targets, sums.codes_MD)
            self._batch = None

        self._handles += [
            chunk.register_forward_pre_hook(begin),
            chunk.register_forward_hook(end),
        ]
        for name, module in probed(chunk):
            self._handles.append(module.register_forward_hook(self._recorder(name)))

    def _recorder(self, name: str) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._batch is None:
                return
            x = output[0] if isinstance(output, tuple) else output
            if name == "projector":
                self._add(FEATURES, self._batch.patches, args[0][:, None])
                self._add(name, self._batch.patches, x[:, None])
            elif name.startswith("visual_head."):
                rows = self._rows()
                if (name, rows.start) not in self._batch.seen:  # else computed again
                    self._batch.seen.add((name, rows.start))
                    x_MDE = x[:, None] if x.dim() == 2 else x.transpose(0, 1)
                    self._add(name, self._batch.targets[rows], x_MDE)
            else:
                columns = self._batch.columns
                if self.groups.plan.sp and "decoder" in name:
                    columns = np.array_split(columns, self.groups.plan.tp)[self.groups.tp_rank]
                self._add(name, columns, x.flatten(0, 1)[:, None])

        return record

    def _rows(self) -> slice:
        """The positions that are in the visual head at the moment."""
        (head,) = [chunk.visual_head for chunk in self.chunks if chunk.visual_head is not None]
        return head.rows

    def _add(self, name: str, keys: np.ndarray, x_NDW: Tensor) -> None:
        """Project vectors [positions, depths, width] and keep them."""
        x_NDW = x_NDW.detach().double()
        projected_ND = x_NDW @ direction(name, x_NDW.shape[-1]).to(x_NDW.device)
        self._keep(name, keys, projected_ND, x_NDW.norm(dim=-1))

    def _exact(self, name: str, keys: np.ndarray, x_ND: Tensor) -> None:
        """Keep integers, which must be equal."""
        self._keep(name, keys, x_ND.double(), torch.zeros_like(x_ND, dtype=torch.double))

    def _keep(self, name: str, keys: np.ndarray, values: Tensor, norms: Tensor) -> None:
        real = keys != _PADDING
        probe = Probe(keys[real], values.cpu().numpy()[real], norms.cpu().numpy()[real])
        self._parts.setdefault(name, []).append(probe)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Places:
    """Keys of a micro-batch's positions on this rank.

    Attributes:
        columns: of its columns, column by column as in [S, B]; -1 for padding.
        patches: of the image patches in them.
        targets: of the positions with a visual target.
        seen: modules of the visual head with the first position they were recorded from.
    """

    columns: np.ndarray
    patches: np.ndarray
    targets: np.ndarray
    seen: set[tuple[str, int | None]] = field(default_factory=set)

    @classmethod
    def of(cls, batch: MicroBatch, numbers: Mapping[str, int], groups: Groups) -> "_Places":
        document_BS, index_BS = batch.document_BS.cpu().long(), batch.index_BS.cpu()
        samples = torch.tensor([numbers[name] for name in batch.sample_ids] or [0])
        far = torch.full((max(1, len(batch.sample_ids)),), _PLACES)
        inside_BS = document_BS >= 0
        first = far.scatter_reduce(0, document_BS[inside_BS], index_BS[inside_BS], "amin")
        of_BS = document_BS.clamp(min=0)
        keys_BS = samples[of_BS] * _PLACES + index_BS - first[of_BS]
        own_BS = batch.own(keys_BS.masked_fill(~inside_BS, _PADDING))
        flat = own_BS.flatten().numpy()
        positions_M = batch.visual_positions_M.cpu().numpy()
        return cls(
            columns=_by_column(own_BS)[:, 0].numpy(),
            patches=flat[batch.image_positions_P.cpu().numpy()],
            targets=np.where(positions_M == NO_POSITION, _PADDING, flat[positions_M]),
        )


def _by_column(x_BS: Tensor) -> Tensor:
    """One value at each of ``_Places.columns``, [S * B, 1]."""
    return x_BS.t().flatten()[:, None]


def probed(chunk: AsvrModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield (canonical name, module) of every module of a chunk that is recorded."""
    for path, module in chunk.named_modules():
        layer = re.match(r"(language_model\.decoder\.layers)\.\d+", path)
        if layer:  # its number here counts from the stage's first layer
            number = chunk.get_submodule(layer[0]).layer_number - 1
            path = f"{layer[1]}.{number}{path.removeprefix(layer[0])}"
        if path == "projector" or _SEQUENCE.fullmatch(path) or _HEAD.fullmatch(path):
            yield path, module


def direction(name: str, width: int) -> Tensor:
    """The fixed random vector fp64 [width] that a module's output is projected onto."""
    return torch.randn(width, generator=generator_of(name), dtype=torch.double)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Where an output of a layout differs from the reference's most.

    Attributes:
        name: canonical name of the module, or what the values are.
        error: relative to the vector's length; infinite where a position is missing or values
            that must be equal are not.
        sample: number of the sample.
        place: position in the sample.
        depth: of the visual tokenizer, 0 where there are none.
        tp_rank: which copy it is.
    """

    name: str
    error: float
    sample: int = 0
    place: int = 0
    depth: int = 0
    tp_rank: int = 0


Probes = dict[tuple[str, int], Probe]


def read_probes(folder: Path) -> Probes:
    """What all ranks saved in a folder, by name and copy, in the first rank's order."""
    parts: dict[tuple[str, int], list[Probe]] = {}
    for path in sorted(folder.glob("*.probes")):
        with safe_open(path, "np") as file:
            for number, (name, copy) in enumerate(json.loads(file.metadata()["names"])):
                columns = (file.get_tensor(f"{number}.{c}") for c in ("keys", "values", "norms"))
                parts.setdefault((name, copy), []).append(Probe(*columns))
    return {key: Probe.join(found) for key, found in parts.items()}


def compare_probes(reference: Probes, layout: Probes) -> list[Difference]:
    """The largest difference of every output, in the order in which one rank computes them."""
    found = []
    for (name, _), want in reference.items():
        copies = [
            _compare(want, got, name=name, tp_rank=tp_rank)
            for (other, tp_rank), got in layout.items()
            if other == name
        ]
        none = Difference(name=name, error=math.inf)
        found.append(max(copies, key=lambda copy: copy.error, default=none))
    return found


def _compare(want: Probe, got: Probe, *, name: str, tp_rank: int) -> Difference:
    """The largest difference of one output."""
    odd = np.setxor1d(want.keys, got.keys)
    if len(odd):  # positions that only one of them has
        return _at(name, math.inf, odd[0], 0, tp_rank)
    if not want.values.size:
        return Difference(name=name, error=0.0, tp_rank=tp_rank)
    delta, norms = np.abs(want.values - got.values), want.norms
    error = np.divide(delta, norms, out=np.where(delta > 0, np.inf, 0.0), where=norms > 0)
    error = np.nan_to_num(error, nan=np.inf, posinf=np.inf)
    row, depth = np.unravel_index(error.argmax(), error.shape)
    return _at(name, float(error[row, depth]), want.keys[row], int(depth), tp_rank)


def _at(name: str, error: float, key: int, depth: int, tp_rank: int) -> Difference:
    sample, place = divmod(int(key), _PLACES)
    return Difference(
        name=name, error=error, sample=sample, place=place, depth=depth, tp_rank=tp_rank
    )
