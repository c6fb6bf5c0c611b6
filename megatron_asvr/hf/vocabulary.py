"""The rule for ``<image>`` and for vocabularies that have no row for it.

The id is the tokenizer's own where it has the token, otherwise the first after all of its tokens.
Embeddings often have spare rows behind the tokens (Qwen2.5: 151,936 rows, 151,665 tokens); the id
then falls on one of those, and nothing is resized. Otherwise ``model.language.vocab_size`` has to
be larger than the source's, and every added row, of the embedding and of the output layer, is the
mean of the source's rows. The embedding row of ``<image>`` is never read, since features take its
place; its output row takes part in the softmax, and with the mean of all rows its logit is the mean
of all logits: never the largest. Zeros would give a logit of 0, which can be the largest.

Rows that pad the vocabulary to a multiple for tensor parallelism are something else: they exist in
memory only and their logits are masked (model/language.py).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megatron_asvr.config.schema import ModelConfig
from megatron_asvr.hf.tables import LM
from megatron_asvr.parallel.stored import Stored, compose

EMBEDDING = LM + "embedding.word_embeddings.weight"
TABLES = (EMBEDDING, LM + "output_layer.weight")


def grown(weights: Mapping[str, Stored], rows: int) -> dict[str, Stored]:
    """The same weights, whose vocabulary tables have at least ``rows`` rows.

    Args:
        weights: by canonical name.
        rows: ``model.language.vocab_size`` of the run.
    """
    made = dict(weights)
    for name in TABLES:
        x = weights.get(name)
        if x is not None and x.shape[0] < rows:
            shape = (rows, *x.shape[1:])
            join = partial(_first_with_rows, rows=rows)
            made[name] = compose(shape, x.dtype, partial(_fill, x, rows), [x], join)
    return made


def _first_with_rows(parts: list[Tensor], rows: int) -> Tensor:
    return with_rows(parts[0], rows)


def _fill(x: Stored, rows: int, out: Tensor, start: int) -> None:
    out.copy_(with_rows(x.read(), rows).view(-1)[start : start + out.numel()])


def with_rows(x: Tensor, rows: int) -> Tensor:
    """``x`` with rows added up to ``rows``, each the mean of its own (fp32, rounded once).

    Args:
        x: [V, H], any dtype.
        rows: wanted; fewer than there are change nothing.
    """
    if rows <= len(x):
        return x
    mean = x.mean(0, dtype=torch.float32).to(x.dtype)
    return torch.cat([x, mean.expand(rows - len(x), -1)])


def as_large_as(model: ModelConfig, source: ModelConfig) -> ModelConfig:
    """``model`` with the vocabulary of ``source``, where rows can be added to that."""
    ours, theirs = model.language, source.language
    if theirs.vocab_size >= ours.vocab_size:
        return model
    return replace(model, language=replace(ours, vocab_size=theirs.vocab_size))
