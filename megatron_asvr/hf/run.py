"""Export of a run: its newest checkpoint, its tokenizers and its template, to one folder."""

from pathlib import Path

import torch

from megatron_asvr.checkpoint.reader import read_run
from megatron_asvr.data.conversation import chat_template
from megatron_asvr.hf.export import export, finalize
from megatron_asvr.model.tokenizer import VisualTokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_run(run: str, out: str, *, dtype: str = "fp32") -> Path:
    """The folder of a stock LLaVA model with the weights of a run.

    Args:
        run: run folder or checkpoint.
        out: folder to write; it must not exist.
        dtype: fp32 or bf16.

    Raises:
        CheckpointError: there is no complete checkpoint.
        ConversionError: the folder exists, or the conversion would be incomplete.
    """
    config, get = read_run(run)
    fingerprint, codebooks = None, {}
    if config.loss.visual_weight:
        tokenizer = VisualTokenizer.load(str(config.model.visual_tokenizer))
        fingerprint = tokenizer.fingerprint
        tables = tokenizer.codebooks.tables()
        codebooks = {f"visual_head.codebooks.{d}": table for d, table in enumerate(tables)}
    partial = export(
        lambda name: codebooks[name] if name in codebooks else get(name),
        config,
        tokenizer=str(config.model.text_tokenizer),
        out=out,
        chat_template=chat_template(config.data.template),
        dtype=DTYPES[dtype],
        tokenizer_fingerprint=fingerprint,
    )
    return finalize(partial, out)
