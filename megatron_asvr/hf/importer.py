"""Reads Hugging Face folders as our tensors: LLaVA models, language models, SigLIP encoders."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_asvr.config.schema import ModelConfig, VisualHeadConfig
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf import stock, tables
from megatron_asvr.hf.files import open_weights, read_json
from megatron_asvr.hf.imported import REPORT, read_imported
from megatron_asvr.hf.resolution import resolution_from
from megatron_asvr.hf.source import Source, drop_tied_copy, matched, sort_out
from megatron_asvr.hf.stock import language_config_from_hf, vision_config_from_hf
from megatron_asvr.parallel.stored import Stored

__all__ = ["Source", "is_source", "language_config_from_hf", "read_folder", "vision_config_from_hf"]

HEAD_FILE = "visual_head.safetensors"
HEAD_CONFIG = "visual_head_config.json"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of folder: how its names on disk become those of the tables, and what is left out.

    Attributes:
        renames: pattern and replacement, the first that matches is applied.
        ignored: names (after renaming) that the model does not use.
    """

    renames: tuple[tuple[str, str], ...]
    ignored: str = r"^$"


# Buffers that old versions saved, and SigLIP's pooling head, which a LLaVA model never runs.
_BUFFERS = r"\.rotary_emb\.inv_freq$|\.embeddings\.position_ids$"
_POOLING = r"^vision_tower\.vision_model\.head\."
_TOWER = "vision_tower.vision_model."
KINDS = {
    "llava": Kind(
        (
            (r"^model\.language_model\.", "language_model.model."),
            (r"^lm_head\.", "language_model.lm_head."),
            (r"^(model\.)?vision_tower\.(vision_model\.)?", _TOWER),
            (r"^model\.(?=multi_modal_projector\.|image_newline$)", ""),
        ),
        f"{_BUFFERS}|{_POOLING}",
    ),
    "text": Kind(((r"^", "language_model."),), _BUFFERS),
    "vision": Kind(
        (
            (r"^vision_model\.", _TOWER),
            (r"^(?=embeddings\.|encoder\.|post_layernorm\.|head\.)", _TOWER),
        ),
        rf"{_BUFFERS}|{_POOLING}|^text_model\.|^logit_(scale|bias)$",
    ),
}
RULES = {
    "llava": tables.llava_rules,
    "text": lambda model: tables.text_rules(model.language),
    "vision": lambda model: tables.vision_rules(model.vision),
}
ARCHITECTURES = {
    **dict.fromkeys(stock.WHOLE, "llava"),
    "SiglipModel": "vision",
    "SiglipVisionModel": "vision",
    **dict.fromkeys(stock.TEXT_ARCHITECTURES.values(), "text"),
}


def is_source(path: str | Path) -> bool:
    """Whether ``path`` is a folder that `read_folder` is meant for."""
    return any((Path(path) / name).is_file() for name in ("config.json", REPORT))


def read_folder(path: str | Path, *, allow_missing: Sequence[str] = ()) -> Source:
    """A reader of a Hugging Face folder (LLaVA, language model or SigLIP) by our names.

    Args:
        path: folder with ``config.json`` and weights, sharded or not. A
            ``visual_head.safetensors`` beside them, as our export writes it, is read too. Or a
            folder that `asvr convert import` wrote.
        allow_missing: shell patterns of our names that need not be there.

    Raises:
        ConversionError: another architecture, another format, or tensors that do not fit.
    """
    folder = Path(path)
    if (folder / REPORT).is_file():
        return read_imported(folder)
    kind = _kind(folder)
    config = stock.read_hf_config(folder)
    model = ModelConfig()
    if kind != "vision":
        model = replace(model, language=stock.language_from(config, str(folder)))
    if kind != "text":
        model = replace(model, vision=stock.vision_from(config, str(folder)))
        model = replace(model, resolution=resolution_from(config, str(folder)))
    on_disk, ignored = sort_out(folder, open_weights(folder), partial(_known_as, kind=KINDS[kind]))
    if kind != "vision" and model.language.tied_embeddings:
        drop_tied_copy(folder, on_disk)
    rules = RULES[kind](model)
    if (folder / HEAD_FILE).is_file():
        head, head_rules, head_tensors = _visual_head(folder)
        model = replace(model, visual_head=head)
        rules, on_disk = rules + head_rules, on_disk | head_tensors
    return matched(
        folder, kind, model, rules, on_disk, ignored=ignored, allow_missing=allow_missing
    )


def _kind(folder: Path) -> str:
    architectures = read_json(folder / "config.json").get("architectures") or [None]
    kind = ARCHITECTURES.get(architectures[0])
    if kind is None and str(architectures[0]).startswith("Siglip2"):
        raise ConversionError(f"{folder}: {stock.VARIABLE_RESOLUTION}")
    if kind is None:
        raise ConversionError(
            f"{folder}/config.json: architecture {architectures[0]!r} is unknown; known are "
            f"{', '.join(ARCHITECTURES)}"
        )
    return kind


def _known_as(name: str, kind: Kind) -> str | None:
    for pattern, replacement in kind.renames:
        renamed, count = re.subn(pattern, replacement, name, count=1)
        if count:
            name = renamed
            break
    return None if re.search(kind.ignored, name) else name


def _visual_head(folder: Path) -> tuple[VisualHeadConfig, list[tables.Rule], dict[str, Stored]]:
    tensors = open_weights(folder, single=HEAD_FILE)
    saved = read_json(folder / HEAD_CONFIG)
    try:
        head = VisualHeadConfig(**{k: saved[k] for k in ("width", "num_layers", "num_heads")})
        sizes = tables.HeadSizes(
            codebook_sizes=tuple(saved["codebook_sizes"]),
            code_width=saved["code_width"],
            with_codebooks=saved["with_codebooks"],
        )
        rules = tables.visual_head_rules(head, saved["hidden_size"], sizes)
    except (KeyError, TypeError) as e:
        raise ConversionError(f"{folder / HEAD_CONFIG} is incomplete or wrong: {e!r}") from e
    got = {name: stored.shape for name, stored in tensors.items()}
    tables.check_complete(str(folder / HEAD_FILE), got, tables.source_shapes(rules))
    return head, rules, tensors
