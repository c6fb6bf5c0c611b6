"""Writes a trained model as a stock Hugging Face folder, complete or not at all.

`export` builds the folder under a temporary name and returns that; the caller verifies it and then
calls `finalize`, which renames it in one step (``hf/partial.py``).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_asvr.config.schema import Config, ModelConfig
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf import stock, tables
from megatron_asvr.hf.card import model_card
from megatron_asvr.hf.files import (
    check_finite,
    read_json,
    save_tensors,
    sync,
    write_json,
)
from megatron_asvr.hf.importer import HEAD_CONFIG, HEAD_FILE
from megatron_asvr.hf.memory import in_memory
from megatron_asvr.hf.partial import finalize, partial_folder, removed_on_error
from megatron_asvr.hf.processor import (
    TOKENIZER_FILE,
    Text,
    TokenIds,
    build_processor,
    build_tokenizer,
    check_tokenizer,
    read_text,
    tokenizer_loader,
)
from megatron_asvr.hf.shards import ShardWriter

__all__ = ["export", "finalize"]

State = Iterable[tuple[str, Tensor]] | Callable[[str], Tensor | None]
SHARD_BYTES = 5_000_000_000


def export(
    state: State,
    config: Config,
    *,
    tokenizer: str | Path,
    out: str | Path,
    chat_template: str | None = None,
    dtype: torch.dtype = torch.float32,
    kind: str = "llava",
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer_fingerprint: str | None = None,
) -> Path:
    """The temporary folder that holds the exported model; pass it to `finalize`.

    Args:
        state: pairs of our global name and full, unpadded tensor, or a function from name to
            tensor (None when absent). Frozen codebooks may come as ``visual_head.codebooks.{d}``.
        config: the run that made the weights.
        tokenizer: SentencePiece model file.
        out: the folder to make; it must not exist yet when `finalize` is called.
        chat_template: Jinja text of the conversation template.
        dtype: of the weights on disk.
        kind: "llava" for the whole model, "text" for the language model alone (other parts of
            ``state`` are then left out).
        max_shard_bytes: largest size of one weights file.
        tokenizer_fingerprint: of the visual tokenizer whose codes the visual head predicts.

    Raises:
        ConversionError: a tensor is missing, unexpected, misshaped, double or not finite, or the
            tokenizer or a setting has no stock form.
    """
    target = partial_folder(Path(out))
    with removed_on_error(target):
        text = read_text(tokenizer, config.model.language.vocab_size)
        hf_config, architecture = _stock_config(config.model, text.ids, kind)
        rules = _checked_rules(config.model, hf_config, architecture)
        pairs = _only(state, rules, config.model, kind)
        head = _write_weights(pairs, rules, target, dtype, max_shard_bytes, kind)
        if kind == "llava":
            _write_head(head, config, target, dtype, tokenizer_fingerprint)
        _write_configs(hf_config, architecture, text.ids, dtype, target)
        _write_processor(text, config, kind, chat_template, target)
        card = model_card(config, kind=kind, dtype=dtype, has_head=bool(head))
        (target / "README.md").write_text(card, encoding="utf-8")
        sync(target)
    return target


def _stock_config(model: ModelConfig, ids: TokenIds, kind: str) -> tuple[Any, str]:
    if kind == "llava":
        config = stock.llava_config(model, ids.special(), ids.image)
        return config, stock.LLAVA_ARCHITECTURE
    if kind != "text":
        raise ConversionError(f"kind is {kind!r}; allowed are 'llava' and 'text'")
    config = stock.text_config(model.language, ids.special())
    return config, stock.TEXT_ARCHITECTURES[model.language.family]


def _checked_rules(model: ModelConfig, config: Any, architecture: str) -> dict[str, tables.Rule]:
    """Our table by name, after it was found to fill the stock model exactly."""
    llava = architecture == stock.LLAVA_ARCHITECTURE
    rules = tables.llava_rules(model) if llava else tables.text_rules(model.language)
    written = in_memory(tables.source_shapes(rules), llava=llava)
    wanted = stock.stock_shapes(architecture, config)
    tables.check_complete(f"our table against {architecture} of transformers", written, wanted)
    return {rule.name: rule for rule in rules}


def _only(
    state: State, rules: dict[str, tables.Rule], model: ModelConfig, kind: str
) -> Iterator[tuple[str, Tensor]]:
    """The pairs of ``state`` that belong into a folder of this kind."""
    pairs = _called(state, rules, model) if callable(state) else state
    prefix = "" if kind == "llava" else tables.LM
    return ((name, x) for name, x in pairs if name.startswith(prefix))


def _called(
    get: Callable[[str], Tensor | None], rules: dict[str, tables.Rule], model: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    names = list(rules)
    if sizes := _head_sizes(get):
        head = tables.visual_head_rules(model.visual_head, model.language.hidden_size, sizes)
        names += [rule.name for rule in head]
    for name in names:
        x = get(name)
        if x is not None:
            yield name, x


def _head_sizes(get: Callable[[str], Tensor | None]) -> tables.HeadSizes | None:
    """What only the weights know of the visual head; None when there is no head."""
    sizes = []
    while (x := get(f"{tables.HEAD}heads.{len(sizes)}.weight")) is not None:
        sizes.append(x.shape[0])
    codes = get(f"{tables.HEAD}code_projection.weight")
    if not sizes or codes is None:
        return None
    return tables.HeadSizes(
        codebook_sizes=tuple(sizes),
        code_width=codes.shape[-1],
        with_codebooks=get(f"{tables.HEAD}codebooks.0") is not None,
    )


def _write_weights(
    pairs: Iterator[tuple[str, Tensor]],
    rules: dict[str, tables.Rule],
    target: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
    kind: str,
) -> dict[str, Tensor]:
    """Write the stock model's weights; the visual head's tensors, by our names, come back."""
    strip = "" if kind == "llava" else tables.HF_LM
    shapes = tables.source_shapes(rules.values())
    planned = {name.removeprefix(strip): (shape, dtype) for name, shape in shapes.items()}
    writer = ShardWriter(target, planned, max_shard_bytes)
    seen: dict[str, tuple[int, ...]] = {}
    head: dict[str, Tensor] = {}
    for name, x in pairs:
        if name in seen or name in head:
            raise ConversionError(f"{name} came twice")
        check_finite(name, x)
        if name.startswith(tables.HEAD):
            head[name] = x.detach().cpu().clone()
            continue
        seen[name] = tuple(x.shape)
        rule = rules.get(name)
        if rule is not None and rule.shape == seen[name]:
            for hf_name, part in rule.split(x):
                writer.add(hf_name.removeprefix(strip), part.to(dtype))
    tables.check_complete("export", seen, {name: rule.shape for name, rule in rules.items()})
    writer.close()
    return head


def _write_head(
    head: dict[str, Tensor],
    config: Config,
    target: Path,
    dtype: torch.dtype,
    fingerprint: str | None,
) -> None:
    """Write the visual head's own file and its description, when the run has one."""
    if not head and config.loss.visual_weight == 0:
        return
    sizes = _head_sizes(head.get)
    if sizes is None:
        raise ConversionError(
            "export: loss.visual_weight is not 0, but the weights hold no visual head "
            f"({tables.HEAD}heads.0.weight and {tables.HEAD}code_projection.weight)"
        )
    settings, width = config.model.visual_head, config.model.language.hidden_size
    rules = tables.visual_head_rules(settings, width, sizes)
    got = {name: tuple(x.shape) for name, x in head.items()}
    tables.check_complete("export of the visual head", got, {r.name: r.shape for r in rules})
    frozen = tables.HEAD + "codebooks."  # searched in fp32, so kept in fp32
    tensors = {
        hf_name: part if rule.name.startswith(frozen) else part.to(dtype)
        for rule in rules
        for hf_name, part in rule.split(head[rule.name])
    }
    save_tensors(target / HEAD_FILE, {k: v.contiguous() for k, v in tensors.items()})
    described = asdict(sizes) | asdict(settings)
    described["hidden_size"] = width
    described["target_shift"] = config.loss.target_shift
    described["visual_tokenizer_fingerprint"] = fingerprint
    write_json(target / HEAD_CONFIG, described)


def _write_processor(
    text: Text, config: Config, kind: str, chat_template: str | None, target: Path
) -> None:
    """Write the tokenizer, and for the whole model the processor around it."""
    (target / TOKENIZER_FILE).write_bytes(text.tokenizer.path.read_bytes())
    tokenizer = build_tokenizer(text, config.model.language.max_positions)
    if kind == "llava":
        build_processor(config, tokenizer, chat_template).save_pretrained(str(target))
    else:
        tokenizer.chat_template = chat_template
        tokenizer.save_pretrained(str(target))
    check_tokenizer(target, text, tokenizer_loader(kind, config.model.language.family))


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
