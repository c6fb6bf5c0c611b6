"""Full tensors to a rank's shards and back, under one set of names for every layout.

A parameter's canonical name is its path in the model with global layer numbers. How it is split
over the tensor-parallel group is written on the parameter itself: megatron-core's attributes
(``tensor_model_parallel``, ``partition_dim``) and two of ours (see ``mark``). So loading,
initialising and collecting weights need no table, and give the same weights in every layout. The
experts of a mixture are shared out whole over the expert-parallel group (``mark_expert``), and
have global numbers too.

``Modules`` is a model, a part of one, or the list of a pipeline stage's model chunks; since names
are global, chunks merge.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron-core)

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor, nn

from megatron_asvr.errors import CheckpointError
from megatron_asvr.parallel.collectives import broadcast_tensor, gather_equal, gather_objects
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.stored import Stored, read_shared
from megatron_asvr.precision import FUSED_NAMES
from megatron_asvr.precision.fp8.weights import fill, numbers_of

Modules = nn.Module | Sequence[nn.Module]
Choice = Callable[[str, nn.Parameter], bool]  # by canonical name and parameter

_LAYER = re.compile(r"(?:.*\.)?layers\.\d+")
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)")
_SHOWN = 5  # names listed in an error


def mark(
    parameter: nn.Parameter, *, dim: int, full_size: int | None = None, blocks: int = 1
) -> nn.Parameter:
    """Return ``parameter`` after writing on it how the tensor-parallel group splits it.

    Args:
        parameter: this rank's shard.
        dim: the axis that is split.
        full_size: size of that axis in the full tensor when the shards together are longer
            (padding at the end); None when they are exactly the full tensor.
        blocks: equal parts along the axis, each split on its own (2 for the gate and up halves of
            a gated linear: a rank holds its share of both).
    """
    if not hasattr(parameter, "tensor_model_parallel"):
        # Not by megatron-core's function: it refuses what its Transformer Engine layers began.
        parameter.tensor_model_parallel = True
        parameter.partition_dim, parameter.partition_stride = dim, 1
    parameter.asvr_full_size = full_size
    parameter.asvr_blocks = blocks
    return parameter


def mark_expert(parameter: nn.Parameter) -> nn.Parameter:
    """Return ``parameter`` after marking it as a weight of one expert of a mixture.

    It is whole on the ranks that hold this expert; ``allreduce`` tells megatron-core to sum its
    gradients over those ranks alone (``Groups.expert_dp``), which it does by itself only with more
    than one expert-parallel rank (tensor_parallel/layers.py, ColumnParallelLinear).
    """
    parameter.allreduce = False
    return parameter


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether ``parameter`` is a weight of one expert of a mixture."""
    return not getattr(parameter, "allreduce", True)


def is_split(parameter: nn.Parameter) -> bool:
    """Whether tensor-parallel ranks hold different parts of ``parameter``."""
    return getattr(parameter, "tensor_model_parallel", False) and not is_expert(parameter)


def mark_parallel_linears(module: nn.Module) -> None:
    """Mark the weights of megatron-core's parallel layers in ``module``.

    megatron-core 0.16 marks them only when it also initialises them (tensor_parallel/layers.py:228
    and :865); 0.19 always does. Transformer Engine's do when they get memory, so not on the meta
    device. Parameters that are marked already are left alone.
    """
    for part in module.modules():
        mode = getattr(part, "parallel_mode", None)  # Transformer Engine's
        if isinstance(part, (VocabParallelEmbedding, ColumnParallelLinear)) or mode == "column":
            parameters, dim = [part.weight, getattr(part, "bias", None)], 0
        elif isinstance(part, RowParallelLinear) or mode == "row":
            parameters, dim = [part.weight], 1
        else:
            continue
        for parameter in parameters:
            is_one = isinstance(parameter, nn.Parameter)  # an absent bias is an empty tensor there
            if is_one and not hasattr(parameter, "tensor_model_parallel"):
                mark(parameter, dim=dim)


def canonical_names(module: nn.Module, *, prefix: str = "") -> dict[str, str]:
    """Canonical name of every parameter, by its name in ``module.named_parameters()``.

    Args:
        module: a model or a part of one (of this pipeline stage).
        prefix: where ``module`` sits in the model, e.g. ``"language_model."``.
    """
    local_layer = {
        path + ".": f"{path.rsplit('.', 1)[0]}.{part.layer_number - 1}."
        for path, part in module.named_modules()
        if _LAYER.fullmatch(path) and hasattr(part, "layer_number")
    }
    tied = [
        f"{path}." if path else ""
        for path, part in module.named_modules()
        if getattr(part, "share_embeddings_and_output_weights", False)
    ]
    first_expert = next(
        (x.ep_group.rank() * x.num_local_experts for x in module.modules() if _holds_experts(x)), 0
    )
    names = {}
    for name, _ in module.named_parameters():
        canonical = name
        for local, final in local_layer.items():
            if name.startswith(local):
                canonical = final + name.removeprefix(local)
        for fused, plain in FUSED_NAMES.items():
            canonical = canonical.replace(fused, plain)
        canonical = _EXPERT.sub(lambda local: str(first_expert + int(local[0])), canonical)
        for part in tied:  # the last stage's copy of the embedding
            if canonical == f"{part}output_layer.weight":
                canonical = f"{part}embedding.word_embeddings.weight"
        names[name] = prefix + canonical
    return names


def _holds_experts(module: nn.Module) -> bool:
    return hasattr(module, "num_local_experts") and hasattr(module, "ep_group")


def named(modules: Modules, *, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (canonical name, this rank's shard) of every parameter.

    Args:
        modules: see the module's docstring.
        prefix: where they sit in the model, e.g. ``"language_model."``.
    """
    for module in [modules] if isinstance(modules, nn.Module) else modules:
        names = canonical_names(module, prefix=prefix)
        for local, parameter in module.named_parameters():
            yield names[local], parameter


def full_shape(parameter: nn.Parameter, *, groups: Groups) -> tuple[int, ...]:
    """Shape of the full tensor of which ``parameter`` is a shard."""
    shape = list(parameter.shape)
    if is_split(parameter):
        dim = parameter.partition_dim
        full_size = getattr(parameter, "asvr_full_size", None)
        shape[dim] = full_size if full_size is not None else shape[dim] * groups.plan.tp
    return tuple(shape)


def _shard(full: Tensor, parameter: nn.Parameter, groups: Groups) -> Tensor:
    """This rank's shard of ``full``; padding is zero."""
    if not is_split(parameter):
        return full
    dim, tp = parameter.partition_dim, groups.plan.tp
    missing = parameter.shape[dim] * tp - full.shape[dim]
    if missing:
        padding = list(full.shape)
        padding[dim] = missing
        full = torch.cat([full, full.new_zeros(padding)], dim)
    blocks = full.chunk(getattr(parameter, "asvr_blocks", 1), dim)
    return torch.cat([block.chunk(tp, dim)[groups.tp_rank] for block in blocks], dim)


def _gather(parameter: nn.Parameter, shard: Tensor, groups: Groups) -> Tensor:
    """The full tensor of which a ``shard`` like ``parameter`` is part; collective over TP."""
    if not is_split(parameter):
        return shard
    dim = parameter.partition_dim
    num_blocks = getattr(parameter, "asvr_blocks", 1)
    shards = gather_equal(shard, group=groups.tp)
    by_rank = [part.chunk(num_blocks, dim) for part in shards]
    full = torch.cat([rank[b] for b in range(num_blocks) for rank in by_rank], dim)
    return full.narrow(dim, 0, full_shape(parameter, groups=groups)[dim])


def load_weights(
    modules: Modules,
    get: Callable[[str], Tensor | None],
    *,
    groups: Groups,
    prefix: str = "",
    strict: bool = True,
    optional: Sequence[str] = (),
) -> list[str]:
    """Copy this rank's shard of every parameter; return the names that ``get`` does not have.

    Args:
        modules: what is filled.
        get: full tensor of a canonical name, or None. Any dtype and device.
        groups: gives the tensor-parallel rank and degree.
        prefix: where ``modules`` sit in the model, e.g. ``"language_model."``.
        strict: a missing tensor is an error.
        optional: shell patterns of names that may be missing all the same.

    Raises:
        CheckpointError: a tensor has another shape than the model, or ``strict`` and one is
            missing. Nothing tells which parameters were already overwritten.
    """
    missing, number = [], 0
    for name, parameter in named(modules, prefix=prefix):
        number += 1
        full = get(name)
        if full is None:
            missing.append(name)
            continue
        _check_shape(name, tuple(full.shape), full_shape(parameter, groups=groups))
        fill(parameter, _shard(full, parameter, groups))
    if strict:
        _check_missing(missing, number, optional)
    return missing


def load_shared(
    modules: Modules,
    weights: Mapping[str, Stored],
    *,
    groups: Groups,
    only: Choice | None = None,
    strict: bool = True,
    optional: Sequence[str] = (),
    convert: Callable[[Tensor], Tensor] | None = None,
) -> list[str]:
    """As ``load_weights``, from files, each of which one rank reads for all.

    All ranks take part, those too whose stage holds nothing of it, and bring the same arguments;
    errors are raised on all. Names that are missing are those of the whole model. What does not fit
    is known before the first number is read.

    Args:
        modules: what this stage holds of the model.
        weights: what is on disk, by canonical name.
        groups: process groups of the layout.
        only: which parameters are wanted; all without it.
        strict: a missing tensor is an error.
        optional: shell patterns of names that may be missing all the same.
        convert: applied to every full tensor first.

    Raises:
        CheckpointError: a tensor has another shape than the model, cannot be read, or ``strict``
            and one is missing.
    """
    shapes = full_shapes(modules, groups=groups, only=only)
    missing = [name for name in shapes if name not in weights]
    if strict:
        _check_missing(missing, len(shapes), optional)
    found = [name for name in shapes if name in weights]
    for name in found:
        _check_shape(name, weights[name].shape, shapes[name])
    mine: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named(modules):
        mine.setdefault(name, []).append(parameter)
    for name, full in read_shared(weights, found, group=groups.world):
        for parameter in mine.get(name, ()):
            part = full if convert is None else convert(full)
            fill(parameter, _shard(part, parameter, groups))
    return missing


def _check_shape(name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if got != wanted:
        raise CheckpointError(
            f"{name} has shape {got}; this model wants {wanted}. "
            "The weights belong to another model: compare its configuration with this run's"
        )


def _check_missing(missing: Sequence[str], number: int, optional: Sequence[str]) -> None:
    lost = [name for name in missing if not any(fnmatchcase(name, p) for p in optional)]
    if lost:
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise CheckpointError(
            f"{len(lost)} of {number} weights are missing: "
            f"{', '.join(lost[:_SHOWN])}{more}. Give a complete source for this part"
        )


def full_shapes(
    modules: Modules, *, groups: Groups, prefix: str = "", only: Choice | None = None
) -> dict[str, tuple[int, ...]]:
    """Full shape of every parameter of the model by canonical name, the same on every rank.

    Collective: all ranks of the pipeline- and expert-parallel groups take part. A tied weight comes
    once. The arguments are those of ``full_state``.
    """
    return {name: shape for name, (*_, shape) in _table(modules, groups, prefix, only).items()}


def full_state(
    modules: Modules,
    *,
    groups: Groups,
    prefix: str = "",
    only: Choice | None = None,
    of: Callable[[nn.Parameter], Tensor] = numbers_of,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (canonical name, full tensor on the CPU) of every parameter, on every rank.

    The exact inverse of ``load_weights``, in the order of the whole model. Collective: all ranks of
    the tensor-, expert- and pipeline-parallel groups must iterate to the end. A tied weight comes
    once.

    Args:
        modules: what this stage holds of the model, or of a part of it (perhaps nothing).
        groups: where to gather.
        prefix: where ``modules`` sit in the model, e.g. ``"language_model."``.
        only: which parameters; all without it.
        of: what is gathered for a parameter, sharded as it is: its values, or its gradient.
    """
    mine = dict(named(modules, prefix=prefix))
    for name, (stage, ep_rank, _) in _table(modules, groups, prefix, only).items():
        full = None
        if stage == groups.pp_rank:
            if name in mine:
                full = _gather(mine[name], of(mine[name]).contiguous(), groups)
            if ".local_experts." in name:
                full = broadcast_tensor(full, ep_rank, group=groups.ep)
        yield name, broadcast_tensor(full, stage, group=groups.pp).cpu()


def _table(
    modules: Modules, groups: Groups, prefix: str, only: Choice | None
) -> dict[str, tuple[int, int, tuple[int, ...]]]:
    """Stage, expert-parallel rank and full shape of every parameter, in the whole model's order."""
    chunks = [
        {
            name: full_shape(parameter, groups=groups)
            for name, parameter in named(chunk, prefix=prefix)
            if only is None or only(name, parameter)
        }
        for chunk in ([modules] if isinstance(modules, nn.Module) else modules)
    ]
    stages = gather_objects(gather_objects(chunks, group=groups.ep), group=groups.pp)
    table: dict[str, tuple[int, int, tuple[int, ...]]] = {}
    for number in range(max(len(ranks[0]) for ranks in stages)):  # first chunks come first
        for stage, ranks in enumerate(stages):
            for ep_rank, held in enumerate(ranks):
                for name, shape in held[number].items() if number < len(held) else ():
                    table.setdefault(name, (stage, ep_rank, shape))
    places: dict[str, int] = {}  # all experts of a layer have the place of the first one
    for name in table:
        places.setdefault(name.partition(".local_experts.")[0], len(places))
    return dict(sorted(table.items(), key=lambda x: places[x[0].partition(".local_experts.")[0]]))


def seeded_init(
    modules: Modules,
    seed: int,
    *,
    groups: Groups,
    std: float | Callable[[str], float],
    prefix: str = "",
) -> None:
    """Initialise every parameter from (seed, canonical name): the same weights in every layout.

    Matrices are normal, biases zero, one-dimensional weights (norms) one. Every draw is made on
    the full tensor, on the CPU in fp32, and then sharded and cast.

    Args:
        modules: what is initialised.
        seed: of the run.
        groups: gives the tensor-parallel rank and degree.
        std: standard deviation of the matrices, or a function of the canonical name.
        prefix: where ``modules`` sit in the model; part of the names that are hashed.
    """
    for name, parameter in named(modules, prefix=prefix):
        shape = full_shape(parameter, groups=groups)
        if name.endswith("bias"):
            full = torch.zeros(shape)
        elif len(shape) == 1:
            full = torch.ones(shape)
        else:
            full = torch.randn(shape, generator=generator_of(f"{seed}:{name}"))
            full *= std(name) if callable(std) else std
        fill(parameter, _shard(full, parameter, groups))


def generator_of(text: str) -> torch.Generator:
    """A new generator on the CPU whose state is a function of ``text``."""
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
