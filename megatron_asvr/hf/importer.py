"""Reads Hugging Face folders as our tensors: whole LLaVA models, language models, SigLIP encoders.

Nothing is taken on trust: every tensor of the folder is either expected by the folder's own
configuration, with the right shape, or on the short list of tensors that a model of this kind does
not need; else the folder is refused before anything is loaded.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_asvr.config.compare import differences
from megatron_asvr.config.schema import (
    LanguageConfig,
    ModelConfig,
    VisionConfig,
    VisualHeadConfig,
)
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf import stock, tables
from megatron_asvr.hf.files import TensorFolder, read_json
from megatron_asvr.hf.stock import language_config_from_hf, vision_config_from_hf

__all__ = ["HfFolder", "language_config_from_hf", "read_folder", "vision_config_from_hf"]

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
            (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
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
ARCHITECTURES = {
    stock.LLAVA_ARCHITECTURE: "llava",
    "SiglipModel": "vision",
    "SiglipVisionModel": "vision",
    **dict.fromkeys(stock.TEXT_ARCHITECTURES.values(), "text"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class HfFolder:
    """A checked Hugging Face folder; calling it with one of our names gives that tensor or None.

    Attributes:
        path: the folder.
        kind: "llava", "text" or "vision".
        language: settings of its language model, None without one.
        vision: settings of its vision encoder, None without one.
    """

    path: Path
    kind: str
    language: LanguageConfig | None
    vision: VisionConfig | None
    _rules: dict[str, tables.Rule] = field(repr=False)
    _readers: dict[str, Callable[[], Tensor]] = field(repr=False)

    @property
    def model(self) -> ModelConfig:
        """Settings of a model with the folder's parts; what it does not hold has its defaults."""
        found = {"language": self.language, "vision": self.vision}
        return ModelConfig(**{name: part for name, part in found.items() if part is not None})

    @property
    def names(self) -> list[str]:
        """Our names of all tensors in the folder."""
        return list(self._rules)

    def __call__(self, name: str) -> Tensor | None:
        """The full tensor called ``name`` in the dtype on disk, or None when it is not here."""
        rule = self._rules.get(name)
        return None if rule is None else rule.join(lambda part: self._readers[part]())

    def check_fits(self, model: ModelConfig, parts: tuple[str, ...]) -> None:
        """Return when this folder's models compute what ``model`` says.

        Args:
            model: settings of the run.
            parts: parts of the model that are taken from this folder.

        Raises:
            ConversionError: a part is not here or a setting that changes its results differs.
        """
        pairs = {"language_model": (self.language, model.language)}
        pairs["vision_encoder"] = (self.vision, model.vision)
        for part in parts:
            prefix = part + "."
            if not any(name.startswith(prefix) for name in self._rules):
                raise ConversionError(f"{self.path} ({self.kind}) holds no {part}")
            found, wanted = pairs.get(part, (None, None))
            if found is not None:
                _compare(f"{self.path}, {part}", found, wanted)


def _compare(where: str, found: Any, wanted: Any) -> None:
    different = differences(found, wanted)
    if different:
        shown = "; ".join(f"{k} is {a!r}, the run asks for {b!r}" for k, a, b in different)
        raise ConversionError(f"{where}: {shown}. Take the settings from the folder's config.json")


def read_folder(path: str | Path) -> HfFolder:
    """A reader of a Hugging Face folder (LLaVA, language model or SigLIP) by our names.

    Args:
        path: folder with ``config.json`` and safetensors, sharded or not. A
            ``visual_head.safetensors`` beside them, as our export writes it, is read too.

    Raises:
        ConversionError: another architecture, another format, or tensors that do not fit.
    """
    folder = Path(path)
    raw = read_json(folder / "config.json")
    architectures = raw.get("architectures") or [None]
    kind = ARCHITECTURES.get(architectures[0])
    if kind is None and str(architectures[0]).startswith("Siglip2"):
        raise ConversionError(f"{folder}: {stock.VARIABLE_RESOLUTION}")
    if kind is None:
        raise ConversionError(
            f"{folder}/config.json: architecture {architectures[0]!r} is unknown; known are "
            f"{', '.join(ARCHITECTURES)}"
        )
    config = stock.read_hf_config(folder)
    language = None if kind == "vision" else stock.language_from(config, str(folder))
    vision = None if kind == "text" else stock.vision_from(config, str(folder))
    rules = _rules_of(language, vision)
    readers = _match(folder, KINDS[kind], rules, language)
    if (folder / HEAD_FILE).is_file():
        head_rules, head_readers = _visual_head(folder)
        rules, readers = rules + head_rules, readers | head_readers
    return HfFolder(
        path=folder,
        kind=kind,
        language=language,
        vision=vision,
        _rules={rule.name: rule for rule in rules},
        _readers=readers,
    )


def _rules_of(language: LanguageConfig | None, vision: VisionConfig | None) -> list[tables.Rule]:
    if language is None:
        return tables.vision_rules(vision)
    if vision is None:
        return tables.text_rules(language)
    return tables.llava_rules(ModelConfig(language=language, vision=vision))


def _match(
    folder: Path, kind: Kind, rules: list[tables.Rule], language: LanguageConfig | None
) -> dict[str, Callable[[], Tensor]]:
    """Readers by the tables' names, after every tensor on disk found its place."""
    files = TensorFolder(folder)
    on_disk: dict[str, str] = {}
    for name in files.shapes:
        known = _rename(name, kind)
        if known in on_disk:
            raise ConversionError(f"{folder}: {name} and {on_disk[known]} are the same tensor")
        if not re.search(kind.ignored, known):
            on_disk[known] = name
    if language is not None and language.tied_embeddings:
        _drop_tied_copy(folder, files, on_disk)
    got = {known: files.shapes[name] for known, name in on_disk.items()}
    tables.check_complete(str(folder), got, tables.source_shapes(rules))
    return {known: partial(files.read, name) for known, name in on_disk.items()}


def _rename(name: str, kind: Kind) -> str:
    for pattern, replacement in kind.renames:
        renamed, count = re.subn(pattern, replacement, name, count=1)
        if count:
            return renamed
    return name


def _drop_tied_copy(folder: Path, files: TensorFolder, on_disk: dict[str, str]) -> None:
    """Forget a saved copy of tied output embeddings, once it is proven to be a copy."""
    copy = on_disk.pop("language_model.lm_head.weight", None)
    original = on_disk.get("language_model.model.embed_tokens.weight")
    if copy and original and not torch.equal(files.read(copy), files.read(original)):
        raise ConversionError(
            f"{folder}: config.json ties the embeddings (tie_word_embeddings), but {copy} differs "
            f"from {original}; set tie_word_embeddings to false"
        )


def _visual_head(folder: Path) -> tuple[list[tables.Rule], dict[str, Callable[[], Tensor]]]:
    files = TensorFolder(folder, single=HEAD_FILE)
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
    tables.check_complete(str(folder / HEAD_FILE), files.shapes, tables.source_shapes(rules))
    return rules, {name: partial(files.read, name) for name in files.shapes}
