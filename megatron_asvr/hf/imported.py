"""The folder that `asvr convert import` writes: our names, our layouts, ready for ``init.all``.

``model*.safetensors`` hold every tensor under its canonical name. ``config.yaml`` has the settings
that the weights belong to, and is a preset for runs that start from them. ``import.json`` says
where all of it came from, and seals the folder.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megatron_asvr.config.load import load, to_dict
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf.files import check_finite, open_weights, read_json, write_json
from megatron_asvr.hf.partial import finalize, partial_folder, removed_on_error
from megatron_asvr.hf.processor import copy_tokenizer
from megatron_asvr.hf.shards import ShardWriter
from megatron_asvr.hf.source import SETTINGS, Source, matched, parts_of
from megatron_asvr.hf.stream import flat_chunks, run_all
from megatron_asvr.hf.tables import Rule
from megatron_asvr.hf.vocabulary import EMBEDDING
from megatron_asvr.model.tokenizer import VisualTokenizer
from megatron_asvr.parallel.stored import Stored

FORMAT = 1
REPORT = "import.json"
SETTINGS_FILE = "config.yaml"
TOKENIZER_FOLDER = "visual_tokenizer"
SHARD_BYTES = 5_000_000_000


def write_imported(
    source: Source,
    out: str | Path,
    *,
    tokenizer: VisualTokenizer | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """The report of an import, after ``out`` was written in one step.

    Args:
        source: what is imported.
        out: the folder to make; it must not exist.
        tokenizer: the visual tokenizer that the weights were trained with, if it came along.
        max_shard_bytes: largest size of one weights file.

    Raises:
        ConversionError: ``out`` exists, or a tensor is not finite.
    """
    out = Path(out)
    target = partial_folder(out)
    with removed_on_error(target):
        plan = {name: (rule.shape, source.dtype(name)) for name, rule in source.rules.items()}
        writer = ShardWriter(target, plan, max_shard_bytes)
        run_all(partial(_copy, name, source.open(name), writer) for name in plan)
        writer.close()
        files = {"visual_tokenizer": TOKENIZER_FOLDER} if tokenizer is not None else {}
        if tokenizer is not None:
            tokenizer.save(target / TOKENIZER_FOLDER)
        text = copy_tokenizer(source.path, target) if source.holds("language_model") else None
        if text is not None:
            files["text_tokenizer"] = text.path.name
        _write_settings(source, out, files, target, rows=text.vocab_size if text else 0)
        report = _report(source, writer.total_bytes)
        write_json(target / REPORT, report)
    finalize(target, out)
    return report


def _copy(name: str, tensor: Stored, writer: ShardWriter) -> None:
    for start, (x,) in flat_chunks(tensor):
        writer.put(name, start, check_finite(name, x))


def _report(source: Source, total_bytes: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "source": str(source.path.resolve()),
        "kind": source.kind,
        "parts": list(parts_of(source.names)),
        "num_tensors": len(source.rules),
        "num_bytes": total_bytes,
        "ignored": list(source.ignored),
        "missing": list(source.missing),
    }


def _write_settings(
    source: Source, out: Path, files: dict[str, str], target: Path, *, rows: int
) -> None:
    """Write the settings of the parts that are here, and where a run finds their files.

    The vocabulary gets the rows that the tokenizer needs with ``<image>`` (hf/vocabulary.py); the
    weights stay as they are.
    """
    model = to_dict(Config(model=source.model))["model"]
    model["language"]["vocab_size"] = max(model["language"]["vocab_size"], rows)
    kept: dict[str, Any] = {SETTINGS[p]: model[SETTINGS[p]] for p in parts_of(source.names)}
    if "projector" in kept:
        kept["resolution"] = model["resolution"]
    home = out.resolve()
    kept |= {name: str(home / file) for name, file in files.items()}
    init: dict[str, Any] = {"all": str(home)}
    if source.missing:
        init["allow_missing"] = list(source.missing)
    tree = {"model": kept, "init": init}
    (target / SETTINGS_FILE).write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def read_imported(folder: Path) -> Source:
    """A reader of a folder that `write_imported` wrote.

    Raises:
        ConversionError: it is of another format, incomplete or damaged.
    """
    report = read_json(folder / REPORT)
    if report.get("format") != FORMAT:
        raise ConversionError(
            f"{folder / REPORT} has format {report.get('format')}; this version reads {FORMAT}: "
            "import the weights again"
        )
    tensors = open_weights(folder)
    if len(tensors) != report.get("num_tensors"):
        raise ConversionError(
            f"{folder} holds {len(tensors)} tensors, but {REPORT} says "
            f"{report.get('num_tensors')}; import the weights again"
        )
    rules = [Rule(name, x.shape, ((name, x.shape),)) for name, x in tensors.items()]
    model = load(folder / SETTINGS_FILE).model
    if EMBEDDING in tensors:  # the settings may ask for more rows
        size = tensors[EMBEDDING].shape[0]
        model = replace(model, language=replace(model.language, vocab_size=size))
    return matched(folder, "asvr", model, rules, tensors)
