"""Conversions as commands: weights from elsewhere into a folder of ours, a run into a stock one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_asvr.checkpoint.identity import VISUAL_TOKENIZER
from megatron_asvr.checkpoint.meta import read_meta
from megatron_asvr.checkpoint.reader import find_checkpoint, read_run
from megatron_asvr.data.conversation import chat_template
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf.export import export, finalize
from megatron_asvr.hf.files import sync
from megatron_asvr.hf.imported import write_imported
from megatron_asvr.hf.importer import read_folder
from megatron_asvr.hf.official import read_official, read_tokenizer
from megatron_asvr.hf.partial import partial_folder, removed_on_error
from megatron_asvr.model.tokenizer import VisualTokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def import_weights(
    source: str,
    out: str,
    *,
    format: str = "hf",
    overrides: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
) -> dict[str, Any]:
    """The report of an import into the folder ``out``, which ``init.all`` can name.

    Args:
        source: a folder in Hugging Face format or of the official code.
        out: folder to write; it must not exist.
        format: "hf" or "asvr-official".
        overrides: ``model.x=y`` settings that an official checkpoint does not tell.
        allow_missing: shell patterns of our names that the source may lack.

    Raises:
        ConversionError: the folder exists, or the source is not understood or incomplete.
    """
    if format == "asvr-official":
        weights, tokenizer = read_official(source, overrides=overrides, allow_missing=allow_missing)
        return write_imported(weights, out, tokenizer=tokenizer)
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
        sync(partial)
    finalize(partial, out)
    return tokenizer.fingerprint


def export_run(run: str, out: str, *, dtype: str = "fp32", kind: str = "llava") -> Path:
    """The folder of a stock LLaVA model, or language model, with the weights of a run.

    Args:
        run: run folder or checkpoint.
        out: folder to write; it must not exist.
        dtype: fp32 or bf16.
        kind: "llava", or "text" for the language model alone.

    Raises:
        CheckpointError: there is no complete checkpoint.
        ConversionError: the folder exists, the conversion would be incomplete, or the visual
            tokenizer is no longer the one that the run learned with.
    """
    config, get = read_run(run)
    fingerprint, codebooks = None, {}
    if config.loss.visual_weight and kind == "llava":
        folder = str(config.model.visual_tokenizer)
        tokenizer = VisualTokenizer.load(folder)
        fingerprint = tokenizer.fingerprint
        learned_with = read_meta(find_checkpoint(Path(run))).identity[VISUAL_TOKENIZER]
        if fingerprint != learned_with:
            raise ConversionError(
                f"{run}: its visual head learned the codes of tokenizer {learned_with[:16]}, but "
                f"{folder} now holds {fingerprint[:16]}; restore that tokenizer's folder"
            )
        tables = tokenizer.codebooks.tables()
        codebooks = {f"visual_head.codebooks.{d}": table for d, table in enumerate(tables)}
    partial = export(
        lambda name: codebooks[name] if name in codebooks else get(name),
        config,
        tokenizer=str(config.model.text_tokenizer),
        out=out,
        chat_template=chat_template(config.data.template),
        dtype=DTYPES[dtype],
        kind=kind,
        tokenizer_fingerprint=fingerprint,
    )
    return finalize(partial, out)
