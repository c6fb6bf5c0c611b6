"""Conversions as commands: weights from elsewhere into a folder of ours, a run into a stock one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_asvr.checkpoint.identity import VISUAL_TOKENIZER
from megatron_asvr.checkpoint.meta import read_meta
from megatron_asvr.checkpoint.reader import find_checkpoint, read_run
from megatron_asvr.config.schema import Config
from megatron_asvr.data.templates import find_template
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf import megatron, stock
from megatron_asvr.hf.equality import Origin, compare, origin_of, require_equal
from megatron_asvr.hf.export import export, finalize
from megatron_asvr.hf.files import read_json
from megatron_asvr.hf.imported import REPORT, TOKENIZER_FOLDER, write_imported
from megatron_asvr.hf.importer import is_source, read_folder
from megatron_asvr.hf.official import read_official, read_tokenizer
from megatron_asvr.hf.partial import partial_folder, removed_on_error
from megatron_asvr.hf.tables import LM
from megatron_asvr.model.tokenizer import VisualTokenizer
from megatron_asvr.parallel.stored import Stored

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def import_weights(
    source: str,
    out: str,
    *,
    format: str = "hf",
    overrides: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    masters: bool = False,
) -> dict[str, Any]:
    """The report of an import into the folder ``out``, which ``init.all`` can name.

    Args:
        source: a folder in Hugging Face format, of the official code or of Megatron-LM.
        out: folder to write; it must not exist.
        format: "hf", "asvr-official" or "megatron-lm".
        overrides: ``model.x=y`` settings that the checkpoint does not tell; none for "hf".
        allow_missing: shell patterns of our names that the source may lack.
        masters: take the optimizer's fp32 weights; "megatron-lm" only.

    Raises:
        ConversionError: the folder exists, or the source is not understood or incomplete.
    """
    if masters and format != megatron.KIND:
        raise ConversionError(f"--masters: a source of format {format} has no master weights")
    if format == "asvr-official":
        weights, tokenizer = read_official(source, overrides=overrides, allow_missing=allow_missing)
        return write_imported(weights, out, tokenizer=tokenizer)
    if format == megatron.KIND:
        weights = megatron.read_megatron(
            source, overrides=overrides, allow_missing=allow_missing, masters=masters
        )
        return write_imported(weights, out)
    if overrides:
        raise ConversionError(
            f"{overrides[0]!r}: a folder in Hugging Face format brings all its settings itself"
        )
    return write_imported(read_folder(source, allow_missing=allow_missing), out)


def import_tokenizer(source: str, out: str, *, overrides: Sequence[str] = ()) -> str:
    """The fingerprint of a tokenizer, after it was written to ``model.visual_tokenizer``'s form.

    Args:
        source: file or folder in the official or DualToken naming.
        out: folder to write; it must not exist.
        overrides: ``model.vision.x=y`` settings of its encoder that the file does not tell.

    Raises:
        ConversionError: the folder exists, or the source is not understood or incomplete.
    """
    partial = partial_folder(Path(out))
    with removed_on_error(partial):
        tokenizer = read_tokenizer(source, overrides=overrides)
        tokenizer.save(partial)
    finalize(partial, out)
    return tokenizer.fingerprint


def export_run(
    run: str, out: str, *, dtype: str = "fp32", kind: str = "llava", verify: bool = True
) -> dict[str, Any] | None:
    """The report of the verification, after ``out`` got the weights of a run in stock form.

    In fp32 they are the optimizer's master weights, of which a bf16 run's own are roundings.

    Args:
        run: run folder or checkpoint.
        out: folder to write; it must not exist.
        dtype: fp32 or bf16.
        kind: "llava", or "text" for the language model alone.
        verify: compare what was written with the run before ``out`` gets its name; else the report
            is None.

    Raises:
        CheckpointError: there is no complete checkpoint, or one of its files is damaged.
        ConversionError: the folder exists, the conversion would be incomplete, the visual
            tokenizer is no longer the one that the run learned with, or the verification failed,
            after which nothing is left.
    """
    config, origin, fingerprint = _run_origin(run, kind, DTYPES[dtype])
    text = TextTokenizer(str(config.model.text_tokenizer))
    partial = export(
        origin.tensors,
        config,
        tokenizer=text.path,
        out=out,
        template=find_template(config.data.template, text),
        dtype=DTYPES[dtype],
        kind=kind,
        tokenizer_fingerprint=fingerprint,
        beside=origin.checks,
    )
    report = None
    with removed_on_error(partial):
        if verify:
            report = compare(partial, origin, dtype=DTYPES[dtype])
            require_equal(report, f"{out} was not written, because it would not hold {run}")
            report["folder"] = out
        finalize(partial, out)
    return report


def verify_weights(origin: str, folder: str, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The report of comparing a folder with what it was made from, weight by weight.

    Args:
        origin: run folder or checkpoint of an export; the source of an import; or any folder in
            Hugging Face format that should hold the same weights.
        folder: as `asvr convert export` or `asvr convert import` wrote it.
        overrides: that the import was given.

    Raises:
        AsvrError: the origin cannot be read, or is damaged.
    """
    kind = kind_of(folder)
    if kind == "import":
        return _verify_imported(origin, Path(folder), overrides)
    if overrides:
        raise ConversionError(f"{overrides[0]!r}: weights are compared as they are stored")
    if is_source(origin):
        return compare(folder, origin_of(read_folder(origin)))
    dtype = stock.read_hf_config(folder).dtype
    return compare(folder, _run_origin(origin, kind, dtype)[1])


def kind_of(folder: str | Path) -> str:
    """What wrote ``folder``: an "import", or an export of a "text" model or a whole one, "llava".

    Raises:
        ConversionError: neither did.
    """
    if (Path(folder) / REPORT).is_file():
        return "import"
    architectures = read_json(Path(folder) / "config.json").get("architectures") or [None]
    return "text" if architectures[0] in stock.TEXT_ARCHITECTURES.values() else "llava"


def _verify_imported(origin: str, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """A report on a folder that `asvr convert import` wrote."""
    said = read_json(folder / REPORT)
    missing = said.get("missing", [])
    if said.get("kind") in (megatron.KIND, megatron.MASTERS):
        masters = said["kind"] == megatron.MASTERS
        source = megatron.read_megatron(
            origin, overrides=overrides, allow_missing=missing, masters=masters
        )
        return compare(folder, origin_of(source))
    if not is_source(origin):
        raise ConversionError(
            f"{origin} is no folder of weights that an import reads; {folder} was imported from "
            f"{said.get('source')}: give that"
        )
    if said.get("kind") != "asvr-official":
        if overrides:
            raise ConversionError(
                f"{overrides[0]!r}: only the import of an official checkpoint is given settings"
            )
        return compare(folder, origin_of(read_folder(origin, allow_missing=missing)))
    own = [] if (folder / TOKENIZER_FOLDER).is_dir() else ["visual_tokenizer.*"]
    source, tokenizer = read_official(origin, overrides=overrides, allow_missing=[*missing, *own])
    report = compare(folder, origin_of(source))
    if tokenizer is not None:
        found = VisualTokenizer.load(folder / TOKENIZER_FOLDER).fingerprint
        if found != tokenizer.fingerprint:
            problem = f"{TOKENIZER_FOLDER} is {found[:16]}; wanted {tokenizer.fingerprint[:16]}"
            report["mismatches"].append(problem)
            report |= {"ok": False, "num_mismatches": report["num_mismatches"] + 1}
    return report


def _run_origin(run: str, kind: str, dtype: torch.dtype) -> tuple[Config, Origin, str | None]:
    """A run's configuration, what an export of it holds, and the visual tokenizer's fingerprint."""
    config, weights = read_run(run, masters=dtype == torch.float32)
    tensors, fingerprint = dict(weights.stored), None
    if kind == "text":
        tensors = {name: x for name, x in tensors.items() if name.startswith(LM)}
    elif config.loss.visual_weight:
        folder = str(config.model.visual_tokenizer)
        tokenizer = VisualTokenizer.load(folder)
        fingerprint = tokenizer.fingerprint
        learned_with = read_meta(find_checkpoint(Path(run))).identity[VISUAL_TOKENIZER]
        if fingerprint != learned_with:
            raise ConversionError(
                f"{run}: its visual head learned the codes of tokenizer {learned_with[:16]}, but "
                f"{folder} now holds {fingerprint[:16]}; restore that tokenizer's folder"
            )
        for depth, table in enumerate(tokenizer.codebooks.tables()):
            tensors[f"visual_head.codebooks.{depth}"] = Stored.of(table)
    checks = tuple(weights.checks)
    return config, Origin(name=run, model=config.model, tensors=tensors, checks=checks), fingerprint
