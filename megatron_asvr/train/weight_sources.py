"""The weights that parts of the model start from: where they are, whether they fit, and loading."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process)

import torch

from megatron_asvr.checkpoint.folder import META, RunFolder
from megatron_asvr.checkpoint.identity import TEXT_TOKENIZER, VISUAL_TOKENIZER
from megatron_asvr.checkpoint.meta import read_meta
from megatron_asvr.checkpoint.reader import find_checkpoint, read_run
from megatron_asvr.config.compare import differences
from megatron_asvr.config.schema import PARTS, Config, ModelConfig
from megatron_asvr.errors import ConfigError
from megatron_asvr.hf.importer import is_source, read_folder
from megatron_asvr.hf.vocabulary import as_large_as, grown
from megatron_asvr.model.asvr import AsvrModel
from megatron_asvr.model.sharding import full_shapes, load_shared
from megatron_asvr.parallel.collectives import gather_objects, on_first
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.stored import Check, Stored, read_shared, run_checks


def load_sources(
    chunks: Sequence[AsvrModel], config: Config, *, facts: Mapping[str, Any], groups: Groups
) -> dict[str, str]:
    """Where each part's first weights come from, after loading them from ``config.init``.

    A part without a source keeps the weights drawn from ``run.seed``. So does a part that the
    common source ``init.all`` does not hold; a source named for the part must hold it. All ranks
    take part: the first one opens the sources, and every file is read by one rank for all.

    Args:
        chunks: the bare model of this rank, drawn from the seed.
        config: the run.
        facts: the run's identity (checkpoint/identity.py).
        groups: process groups of the layout.

    Raises:
        ConfigError: a source is no folder of weights, or its settings differ from the model's.
        CheckpointError: a source lacks weights or holds weights of another shape.
        ConversionError: a Hugging Face folder is not understood.
    """
    names = full_shapes(chunks, groups=groups)
    held = [part for part in PARTS if any(_part_of(name) == part for name in names)]
    origins = dict.fromkeys(held, f"run.seed={config.run.seed}")
    sources: dict[str, list[str]] = {}
    for part in held:
        if (source := config.init.source(part)) is not None:
            sources.setdefault(source, []).append(part)
    for path, parts in sources.items():
        opened = on_first(partial(open_source, path, parts, config), group=groups.world)
        there = {_part_of(name) for name in opened.weights}
        for part in parts:
            if part not in there and getattr(config.init, part) is None:
                origins[part] += f" (init.all={path} does not hold it)"
                continue
            wanted = [name for name in names if _part_of(name) == part]
            checks = [check for name in wanted for check in opened.checks_of.get(name, ())]
            run_checks(list(dict.fromkeys(checks)), group=groups.world)
            missing = load_shared(
                chunks,
                opened.weights,
                groups=groups,
                only=lambda name, _, part=part: _part_of(name) == part,
                optional=config.init.allow_missing,
            )
            _check_learned(opened, path, part, chunks, facts, groups)
            seed = f" ({len(missing)} weights from run.seed={config.run.seed})"
            origins[part] = path + (seed if missing else "")
    return origins


def _part_of(name: str) -> str:
    return name.partition(".")[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A source of weights whose settings fit.

    Attributes:
        weights: by canonical name.
        checks_of: what to call before a weight is read, if anything.
        learned_with: what its run was identified by; None when it is no run.
    """

    weights: Mapping[str, Stored]
    checks_of: Mapping[str, Sequence[Check]]
    learned_with: Mapping[str, Any] | None


def open_source(path: str, parts: Sequence[str], config: Config) -> Opened:
    """The weights in a folder, of which only headers are read.

    Args:
        path: a run folder, one of its checkpoints, or a folder that `hf.importer` reads.
        parts: the parts of the model that are taken from it, as far as it has them.
        config: the run, whose model the source must fit.

    Raises:
        ConfigError: the folder holds no weights, or its settings differ from the model's.
        CheckpointError: it is a run without a complete checkpoint.
        ConversionError: a Hugging Face folder is not understood.
    """
    folder, rows = Path(path), config.model.language.vocab_size
    if _is_run(folder):
        theirs, found = read_run(folder)
        for part in parts:
            _check_same(path, part, theirs.model, as_large_as(config.model, theirs.model))
        facts = read_meta(find_checkpoint(folder)).identity
        weights = grown(found.stored, rows)
        return Opened(weights=weights, checks_of=found.checks_of, learned_with=facts)
    if is_source(folder):
        source = read_folder(folder, allow_missing=config.init.allow_missing)
        there = tuple(part for part in parts if source.holds(part))
        source.check_fits(as_large_as(config.model, source.model), there)
        return Opened(weights=grown(source.weights, rows), checks_of={}, learned_with=None)
    raise ConfigError(
        f"init source {path!r} of {parts[0]} is neither a run folder, nor a checkpoint, "
        "nor a Hugging Face folder (config.json), nor one that `asvr convert import` wrote"
    )


_SETTINGS = {
    "vision_encoder": "vision",
    "language_model": "language",
    "visual_head": "visual_head",
    "projector": "projector",
}


def _is_run(folder: Path) -> bool:
    return (folder / META).is_file() or RunFolder(folder).checkpoints.is_dir()


# The files that give a part's rows their meaning: weights learned with others do not fit.
_LEARNED_WITH = {"language_model": TEXT_TOKENIZER, "visual_head": VISUAL_TOKENIZER}


def _check_learned(
    opened: Opened,
    path: str,
    part: str,
    chunks: Sequence[AsvrModel],
    facts: Mapping[str, Any],
    groups: Groups,
) -> None:
    """Refuse words or codes that were learned with another tokenizer; all ranks take part."""
    fact = _LEARNED_WITH.get(part)
    if fact is None:
        return
    same = True  # a Hugging Face folder does not say which text tokenizer is ours
    if opened.learned_with is not None:
        same = opened.learned_with.get(fact) == facts[fact]
    elif part == "visual_head":
        tables = [n for n in opened.weights if n.startswith("visual_head.codebooks.")]
        heads = [head for chunk in chunks if (head := chunk.parts().get(part)) is not None]
        for name, theirs in read_shared(opened.weights, tables, group=groups.world):
            own = [head.codebooks.tables()[int(name.rpartition(".")[2])] for head in heads]
            same = same and all(torch.equal(theirs.float().cpu(), table.cpu()) for table in own)
        same = all(gather_objects(same, group=groups.world))
    if not same:
        raise ConfigError(
            f"{part} in {path} was trained with another {fact.partition(' ')[0]} than this run's; "
            f"use that one, or leave init.all unset and name the sources of the other parts "
            f"(init.projector=...), so that {part} starts anew"
        )


def _check_same(path: str, part: str, source: ModelConfig, model: ModelConfig) -> None:
    name = _SETTINGS[part]
    different = [
        f"model.{name}.{key} is {theirs!r} there and {ours!r} here"
        for key, theirs, ours in differences(getattr(source, name), getattr(model, name))
    ]
    if different:
        raise ConfigError(
            f"the weights of {part} in {path} belong to another model: {'; '.join(different)}"
        )
