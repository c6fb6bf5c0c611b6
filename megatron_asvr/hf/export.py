"""Writes a trained model as a stock Hugging Face folder, complete or not at all.

`export` builds the folder under a temporary name and returns that; the caller verifies it and then
calls `finalize`, which renames it in one step (``hf/partial.py``).
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_asvr.config.schema import Config, ModelConfig
from megatron_asvr.data.conversation import Template
from megatron_asvr.data.text import SENTENCEPIECE_MODEL
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf import stock, tables
from megatron_asvr.hf.card import model_card
from megatron_asvr.hf.files import check_finite, read_json, write_json
from megatron_asvr.hf.importer import HEAD_CONFIG, HEAD_FILE
from megatron_asvr.hf.memory import in_memory
from megatron_asvr.hf.partial import finalize, partial_folder, removed_on_error
from megatron_asvr.hf.processor import (
    Text,
    TokenIds,
    build_processor,
    build_tokenizer,
    check_tokenizer,
    load_tokenizer,
    read_text,
    tokenizer_loader,
    write_through,
)
from megatron_asvr.hf.shards import ShardWriter
from megatron_asvr.hf.stream import flat_chunks, run_all
from megatron_asvr.parallel.stored import Stored

__all__ = ["export", "finalize"]

State = Mapping[str, Stored] | Iterable[tuple[str, Tensor]]
SHARD_BYTES = 5_000_000_000
CODEBOOKS = f"{tables.HEAD}codebooks."


def export(
    state: State,
    config: Config,
    *,
    tokenizer: str | Path,
    out: str | Path,
    template: Template | None = None,
    dtype: torch.dtype = torch.float32,
    kind: str = "llava",
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer_fingerprint: str | None = None,
    beside: Iterable[Callable[[], None]] = (),
) -> Path:
    """The temporary folder that holds the exported model; pass it to `finalize`.

    Args:
        state: full, unpadded tensors on disk by our global name, or pairs of name and tensor.
            Frozen codebooks may come as ``visual_head.codebooks.{d}``.
        config: the run that made the weights.
        tokenizer: SentencePiece model or ``tokenizer.json``.
        out: the folder to make; it must not exist yet when `finalize` is called.
        template: of the conversations that the model was trained on.
        dtype: of the weights on disk.
        kind: "llava" for the whole model, "text" for the language model alone (other parts of
            ``state`` are then left out).
        max_shard_bytes: largest size of one weights file.
        tokenizer_fingerprint: of the visual tokenizer whose codes the visual head predicts.
        beside: called while the weights are written, such as checks of the files they come from.

    Raises:
        ConversionError: a tensor is missing, unexpected, misshaped, double or not finite, or the
            tokenizer or a setting has no stock form.
    """
    target = partial_folder(Path(out))
    with removed_on_error(target):
        rows = config.model.language.vocab_size
        text = read_text(tokenizer, rows, needs_image=kind == "llava")
        ids = text.ids if template is None else replace(text.ids, eos=template.end_id)
        hf_config, architecture = _stock_config(config.model, ids, kind)
        rules = _checked_rules(config.model, hf_config, architecture)
        held = _held(state, kind)
        body, head = _checked(held, rules, config)
        _write_weights(held, body, head, target, dtype, max_shard_bytes, kind, beside)
        if head:
            _describe_head(held, config, target, tokenizer_fingerprint)
        _write_configs(hf_config, architecture, ids, dtype, target)
        spm, family = text.tokenizer.is_sentencepiece, config.model.language.family
        loader = tokenizer_loader(kind, family, sentencepiece=spm)
        _write_processor(text, config, kind, template, loader, target)
        card = model_card(config, kind=kind, dtype=dtype, has_head=bool(head), loader=loader)
        (target / "README.md").write_text(card, encoding="utf-8")
    return target


def _stock_config(model: ModelConfig, ids: TokenIds, kind: str) -> tuple[Any, str]:
    if kind == "llava":
        config = stock.llava_config(model, ids.special(), ids.image)
        return config, stock.WHOLE[model.resolution.mode != "single"]
    if kind != "text":
        raise ConversionError(f"kind is {kind!r}; allowed are 'llava' and 'text'")
    config = stock.text_config(model.language, ids.special())
    return config, stock.TEXT_ARCHITECTURES[model.language.family]


def _checked_rules(model: ModelConfig, config: Any, architecture: str) -> dict[str, tables.Rule]:
    """Our table by name, after it was found to fill the stock model exactly."""
    llava = architecture in stock.WHOLE
    rules = tables.llava_rules(model) if llava else tables.text_rules(model.language)
    written = in_memory(tables.source_shapes(rules), llava=llava)
    wanted = stock.stock_shapes(architecture, config)
    tables.check_complete(f"our table against {architecture} of transformers", written, wanted)
    return {rule.name: rule for rule in rules}


def _held(state: State, kind: str) -> dict[str, Stored]:
    """The tensors of ``state`` that belong into a folder of this kind."""
    prefix = "" if kind == "llava" else tables.LM
    held: dict[str, Stored] = {}
    for name, x in state.items() if isinstance(state, Mapping) else state:
        if name in held:
            raise ConversionError(f"{name} came twice")
        if name.startswith(prefix):
            held[name] = x if isinstance(x, Stored) else Stored.of(x)
    return held


def _checked(
    held: Mapping[str, Stored], rules: dict[str, tables.Rule], config: Config
) -> tuple[list[tables.Rule], list[tables.Rule]]:
    """The rules of the stock model and of the visual head, which ``held`` fills exactly."""
    shapes = {name: x.shape for name, x in held.items() if not name.startswith(tables.HEAD)}
    tables.check_complete("export", shapes, {name: rule.shape for name, rule in rules.items()})
    got = {name: x.shape for name, x in held.items() if name.startswith(tables.HEAD)}
    whole = tables.PROJECTOR + "linear_1.weight" in rules
    if not got and (config.loss.visual_weight == 0 or not whole):
        return list(rules.values()), []
    settings, width = config.model.visual_head, config.model.language.hidden_size
    head = tables.visual_head_rules(settings, width, _head_sizes(held))
    tables.check_complete("export of the visual head", got, {r.name: r.shape for r in head})
    return list(rules.values()), head


def _head_sizes(held: Mapping[str, Stored]) -> tables.HeadSizes:
    """What only the weights know of the visual head."""
    sizes: list[int] = []
    while x := held.get(f"{tables.HEAD}heads.{len(sizes)}.weight"):
        sizes.append(x.shape[0])
    codes = held.get(f"{tables.HEAD}code_projection.weight")
    if not sizes or codes is None:
        raise ConversionError(
            "export: loss.visual_weight is not 0, but the weights hold no visual head "
            f"({tables.HEAD}heads.0.weight and {tables.HEAD}code_projection.weight)"
        )
    return tables.HeadSizes(
        codebook_sizes=tuple(sizes),
        code_width=codes.shape[-1],
        with_codebooks=f"{tables.HEAD}codebooks.0" in held,
    )


def _write_weights(
    held: Mapping[str, Stored],
    body: Iterable[tables.Rule],
    head: Iterable[tables.Rule],
    target: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
    kind: str,
    beside: Iterable[Callable[[], None]],
) -> None:
    """Write the stock model's weights, and the visual head's into a file of their own."""
    strip = "" if kind == "llava" else tables.HF_LM
    planned = {
        name.removeprefix(strip): (shape, dtype)
        for name, shape in tables.source_shapes(body).items()
    }
    writer = ShardWriter(target, planned, max_shard_bytes)
    tasks = [partial(_write, rule, held[rule.name], writer, dtype, strip) for rule in body]
    writers = [writer]
    if head:
        # Codebooks are searched in fp32, so they stay that.
        types = {rule: torch.float32 if CODEBOOKS in rule.name else dtype for rule in head}
        planned = {rule.parts[0][0]: (rule.shape, types[rule]) for rule in head}
        own = ShardWriter(target, planned, sys.maxsize, HEAD_FILE)
        tasks += [partial(_write, r, held[r.name], own, types[r], "") for r in head]
        writers.append(own)
    run_all([*beside, *tasks])
    for each in writers:
        each.close()


def _write(
    rule: tables.Rule, tensor: Stored, writer: ShardWriter, dtype: torch.dtype, strip: str
) -> None:
    """Write the parts of one of our tensors."""
    for start, (x,) in flat_chunks(tensor):
        check_finite(rule.name, x)
        converted = x.to(dtype)
        for part, begin, place in rule.cut(start, start + x.numel()):
            writer.put(part.removeprefix(strip), begin, converted[place])


def _describe_head(
    held: Mapping[str, Stored], config: Config, target: Path, fingerprint: str | None
) -> None:
    described = asdict(_head_sizes(held)) | asdict(config.model.visual_head)
    described["hidden_size"] = config.model.language.hidden_size
    described["target_shift"] = config.loss.target_shift
    described["visual_tokenizer_fingerprint"] = fingerprint
    write_json(target / HEAD_CONFIG, described)


def _write_processor(
    text: Text, config: Config, kind: str, template: Template | None, loader: str, target: Path
) -> None:
    """Write the tokenizer, and for the whole model the processor around it."""
    jinja = template.chat_template(with_begin=kind == "text") if template is not None else None
    if text.tokenizer.is_sentencepiece:
        (target / SENTENCEPIECE_MODEL).write_bytes(text.tokenizer.document(with_image=True))
        tokenizer = build_tokenizer(text, config.model.language.max_positions)
    else:
        write_through(text, target)
        tokenizer = load_tokenizer(target)
    if kind == "llava":
        build_processor(config, tokenizer, jinja).save_pretrained(str(target))
    else:
        tokenizer.chat_template = jinja
        tokenizer.save_pretrained(str(target))
    if not text.tokenizer.is_sentencepiece:
        write_through(text, target)  # transformers wrote it again, in a form of its own
    check_tokenizer(target, text, loader)


def _write_configs(
    config: Any, architecture: str, ids: TokenIds, dtype: torch.dtype, target: Path
) -> None:
    config.architectures = [architecture]
    config.dtype = dtype
    config.save_pretrained(str(target))
    # transformers 4 reads these two here and would silently use its defaults without them.
    path = target / "config.json"
    saved = read_json(path)
    text = saved.get("text_config", saved)
    rope = dict(text["rope_parameters"])
    text["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        text["rope_scaling"] = rope
    write_json(path, saved)
    generation = stock.transformers().GenerationConfig(do_sample=False, **ids.special())
    generation.save_pretrained(str(target))
