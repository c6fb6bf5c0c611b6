"""Reads checkpoints of the official ASVR code, and residual-VQ tokenizers in its naming.

The tokenizer's naming is also that of DualToken. Sizes come from ``config.json`` and from the
tensors; the number of the vision encoder's heads is known for the published SigLIP sizes only, and
else is a setting (``model.vision.num_heads=...``). The official code keeps a second, visual branch
in memory that never reaches a loss; its tensors are left out, like everything else that neither
the model nor its training targets need.

Source: github.com/AlenjandroWang/ASVR at ea87c3e, asvr/model; github.com/songweii/DualToken.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_asvr.config.load import override
from megatron_asvr.config.schema import Config, ModelConfig, VisionConfig, VisualHeadConfig
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf import stock, tables
from megatron_asvr.hf.files import check_finite, open_weights, read_json
from megatron_asvr.hf.source import Source, drop_tied_copy, matched, may_miss, sort_out
from megatron_asvr.hf.tables import Rule, Run, Shape
from megatron_asvr.model.tokenizer import TokenizerConfig, VisualTokenizer
from megatron_asvr.parallel.stored import Stored

KIND = "asvr-official"
TOKENIZER = "visual_tokenizer."  # the tokenizer's own encoder, among our names of an import
_HEAD, _RQ = "head.", "rqvaesiglip."  # among the names of this module's tables
_SIGLIP, _CODEBOOKS = f"{_RQ}siglip_model.vision_model.", f"{_RQ}quantizer_semantic.codebooks."
_INSIDE = r"^model\.vision_tokenizer\.vision_tower\."
_RENAMES = (
    (rf"{_INSIDE}rqtransformer_semantic\.", _HEAD),
    (rf"{_INSIDE}(?=rqvaesiglip\.)", ""),
    (rf"{_INSIDE}(?=rqtransformer_visual\.)", ""),
    (r"^(?=siglip_model\.|quantizer|p(re|ost)_?quant_|decoder\.|encoder\.)", _RQ),
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", tables.HF_VISION),
    (r"^model\.mm_projector\.0\.", f"{tables.HF_PROJECTOR}linear_1."),
    (r"^model\.mm_projector\.2\.", f"{tables.HF_PROJECTOR}linear_2."),
    (r"^projector\.0\.", f"{_HEAD}projector.linear_1."),
    (r"^projector\.2\.", f"{_HEAD}projector.linear_2."),
    (r"^(?=model\.(embed_tokens|layers|norm)\.|lm_head\.)", tables.HF_LM),
)
# The visual branch, decoders, text towers, pooling heads, statistics of the codebooks' training,
# and biases that the official depth transformer has but never adds.
_IGNORED = re.compile(
    r"^rqtransformer_visual\.|^rqvaesiglip\.(quantizer|quantizer_pixel)\."
    r"|^rqvaesiglip\.(prequant_(visual|pixel|shortcut)|post_?quant_\w+|decoder)\."
    r"|^rqvaesiglip\.siglip_model\.(text_model\.|logit_(scale|bias)$)"
    r"|\.vision_model\.head\.|\.(cluster_size_ema|embed_ema)$"
    r"|^head\.head_transformer\.\d+\.linear[12]\.bias$"
    r"|\.rotary_emb\.inv_freq$|\.embeddings\.position_ids$"
)
_HEADS = {768: 12, 1024: 16, 1152: 16}  # of the published SigLIP encoders, by width


@dataclass(frozen=True, slots=True)
class PerDepth:
    """Matrices of all depths side by side: [rows, depths x columns] there, ours is depth first."""

    depths: int

    def join(self, parts: list[Tensor]) -> Tensor:
        """Our tensor."""
        return parts[0].unflatten(1, (self.depths, -1)).transpose(0, 1).contiguous()

    def split(self, x: Tensor) -> list[Tensor]:
        """The parts."""
        return [x.transpose(0, 1).flatten(1)]

    def runs(self, shape: Shape, parts: list[Shape]) -> Iterator[Run]:
        """Where our elements lie."""
        depths, rows, columns = shape
        for depth in range(depths):
            for row in range(rows):
                yield 0, (row * depths + depth) * columns, columns


@dataclass(frozen=True, slots=True)
class Stacked:
    """Queries, keys and values on one axis there, [3, ...] here."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """Our tensor."""
        return parts[0].unflatten(0, (3, -1))

    def split(self, x: Tensor) -> list[Tensor]:
        """The parts."""
        return [x.flatten(0, 1)]

    def runs(self, shape: Shape, parts: list[Shape]) -> Iterator[Run]:
        """Where our elements lie."""
        yield 0, 0, math.prod(shape)


@dataclass(frozen=True, slots=True)
class WithoutLast:
    """A codebook, which has one more row there that no code ever names."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """Our tensor."""
        return parts[0][:-1]

    def split(self, x: Tensor) -> list[Tensor]:
        """The parts."""
        return [torch.cat([x, torch.zeros_like(x[:1])])]

    def runs(self, shape: Shape, parts: list[Shape]) -> Iterator[Run]:
        """Where our elements lie."""
        yield 0, 0, math.prod(shape)


def read_official(
    path: str | Path, *, overrides: Sequence[str] = (), allow_missing: Sequence[str] = ()
) -> tuple[Source, VisualTokenizer | None]:
    """The weights of an official checkpoint by our names, and its visual tokenizer.

    Args:
        path: folder with ``config.json`` and weights, sharded or not.
        overrides: ``model.x=y`` settings that its files do not tell.
        allow_missing: shell patterns of our names that need not be there; the tokenizer's own
            encoder is ``visual_tokenizer.*``.

    Raises:
        ConversionError: a setting is unknown, or tensors do not fit.
    """
    folder = Path(path)
    raw = read_json(folder / "config.json")
    for setting, other in (("use_s2", True), ("image_aspect_ratio", "anyres")):
        if raw.get(setting) == other:
            raise ConversionError(
                f"{folder}/config.json: {setting}={other!r}, but only checkpoints that were "
                "trained on one view of an image can be imported"
            )
    tensors, ignored = _sorted(folder)
    shapes = {name: stored.shape for name, stored in tensors.items()}
    model = ModelConfig(language=stock.language_from_raw(raw, str(folder)))
    has_vision = _has(folder, tables.HF_VISION, "vision_encoder.", shapes, allow_missing)
    if has_vision:
        vision = _vision(folder, shapes, tables.HF_VISION, overrides)
        layer = raw.get("mm_vision_select_layer", -2)
        model = replace(model, vision=replace(vision, feature_layer=layer))
    has_head = _has(folder, _HEAD, "visual_head.", shapes, allow_missing)
    if has_head:
        model = replace(model, visual_head=_head(folder, shapes))
    described = None
    if _has(folder, _RQ, TOKENIZER, shapes, allow_missing):
        described = _tokenizer_config(folder, raw, shapes, overrides)
    model = override(Config(model=model), overrides).model

    rules = [*tables.text_rules(model.language), *tables.projector_rules(model)]
    rules += tables.vision_rules(model.vision) if has_vision else []
    rules += _head_rules(model, shapes) if has_head else []
    rules += _tokenizer_rules(described) if described is not None else []
    if model.language.tied_embeddings:
        drop_tied_copy(folder, tensors)
    whole = matched(
        folder, KIND, model, rules, tensors, ignored=ignored, allow_missing=allow_missing
    )
    own = {name: rule for name, rule in whole.rules.items() if not name.startswith(TOKENIZER)}
    missing = tuple(name for name in whole.missing if not name.startswith(TOKENIZER))
    source = replace(whole, rules=own, missing=missing)
    return source, None if described is None else _tokenizer(whole, described)


def read_tokenizer(path: str | Path, *, overrides: Sequence[str] = ()) -> VisualTokenizer:
    """A residual-VQ tokenizer in the official or DualToken naming: its semantic codebooks.

    Args:
        path: a file, or a folder of weights with or without ``config.json``.
        overrides: ``model.vision.x=y`` settings of its encoder that the file does not tell.

    Raises:
        ConversionError: a setting is unknown, or tensors do not fit.
    """
    path = Path(path)
    raw = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    tensors, _ = _sorted(path)
    tensors = {name: stored for name, stored in tensors.items() if name.startswith(_RQ)}
    shapes = {name: stored.shape for name, stored in tensors.items()}
    described = _tokenizer_config(path, raw, shapes, overrides)
    model = ModelConfig(vision=described.vision)
    return _tokenizer(matched(path, KIND, model, _tokenizer_rules(described), tensors), described)


def _sorted(path: Path) -> tuple[dict[str, Stored], tuple[str, ...]]:
    tensors, ignored = sort_out(path, open_weights(path), _known_as)
    if projections := [name for name in tensors if f"{_RQ}prequant_semantic." in name]:
        raise ConversionError(
            f"{path}: the tokenizer projects features before it quantises them "
            f"({projections[0]}); only features quantised as they are can be converted"
        )
    return tensors, ignored


def _known_as(name: str) -> str | None:
    name = name.removeprefix("module.")  # of torch's data parallelism
    for pattern, replacement in _RENAMES:
        renamed, count = re.subn(pattern, replacement, name, count=1)
        if count:
            name = renamed
            break
    return None if _IGNORED.search(name) else name


def _has(
    path: Path, prefix: str, ours: str, shapes: dict[str, Shape], allow_missing: Sequence[str]
) -> bool:
    """Whether a part is there; it must be, unless all of it may be missing."""
    if any(name.startswith(prefix) for name in shapes):
        return True
    if may_miss(f"{ours}any", allow_missing):
        return False
    raise ConversionError(
        f"{path} holds nothing of {ours.rstrip('.')}; if that is meant: --allow-missing '{ours}*'"
    )


def _shape(path: Path, shapes: dict[str, Shape], name: str, rank: int) -> Shape:
    shape = shapes.get(name)
    if shape is None or len(shape) != rank:
        got = "is not there" if shape is None else f"has shape {list(shape)}"
        raise ConversionError(f"{path}: {name} {got}; wanted a tensor of {rank} dimensions")
    return shape


def _count(shapes: dict[str, Shape], prefix: str) -> int:
    """How many numbers follow ``prefix`` in the names."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({found[1] for name in shapes if (found := pattern.match(name))})


def _vision(
    path: Path, shapes: dict[str, Shape], prefix: str, overrides: Sequence[str]
) -> VisionConfig:
    """Settings of a SigLIP tower, from its shapes and the overrides."""
    width, _, patch, _ = _shape(path, shapes, f"{prefix}embeddings.patch_embedding.weight", 4)
    number, _ = _shape(path, shapes, f"{prefix}embeddings.position_embedding.weight", 2)
    ffn, _ = _shape(path, shapes, f"{prefix}encoder.layers.0.mlp.fc1.weight", 2)
    own = [text for text in overrides if text.startswith("model.vision.")]
    heads = _HEADS.get(width)
    if heads is None and not any(text.startswith("model.vision.num_heads=") for text in own):
        raise ConversionError(
            f"{path}: a SigLIP encoder of width {width} is none of the published ones "
            f"({sorted(_HEADS)}); say how many heads it has: model.vision.num_heads=N"
        )
    usual = VisionConfig(patch_size=patch)
    grid = round(number**0.5)
    found = VisionConfig(
        hidden_size=width,
        num_layers=_count(shapes, f"{prefix}encoder.layers."),
        num_heads=heads or 1,
        ffn_hidden_size=ffn,
        image_size=usual.image_size if usual.grid == grid else grid * patch,
        patch_size=patch,
    )
    return override(Config(model=ModelConfig(vision=found)), own).model.vision


def _head(path: Path, shapes: dict[str, Shape]) -> VisualHeadConfig:
    width, _ = _shape(path, shapes, f"{_HEAD}in_mlp_1.weight", 2)
    return VisualHeadConfig(width=width, num_layers=_count(shapes, f"{_HEAD}head_transformer."))


def _head_rules(model: ModelConfig, shapes: dict[str, Shape]) -> Iterator[Rule]:
    """Rules of the visual head, whose codebooks are the tokenizer's."""
    depths = _count(shapes, f"{_HEAD}heads.")
    sizes = tables.HeadSizes(
        codebook_sizes=tuple(
            shapes.get(f"{_HEAD}heads.{d}.weight", (0,))[0] for d in range(depths)
        ),
        code_width=shapes.get(f"{_HEAD}in_mlp_1.weight", (0, 0))[-1],
        with_codebooks=f"{_CODEBOOKS}0.weight" in shapes,
    )
    rules = tables.visual_head_rules(model.visual_head, model.language.hidden_size, sizes)
    return map(_official_head, rules)


_HEAD_NAMES = (
    (r"^code_projection\.", "in_mlp_1."),
    (r"^norm\.", "headnorm."),
    (r"^layers\.(\d+)\.norm", r"head_transformer.\1.layernorm"),
    (r"^layers\.(\d+)\.attention\.in_proj\.", r"head_transformer.\1.self_attention.in_proj_"),
    (r"^layers\.(\d+)\.attention\.", r"head_transformer.\1.self_attention."),
    (r"^layers\.(\d+)\.mlp\.w([12])$", r"head_transformer.\1.linear\2.weight"),
)


def _official_head(rule: Rule) -> Rule:
    """A rule of the visual head's own file, as the official code names and lays out its tensor."""
    name, shape = rule.parts[0]
    if found := re.fullmatch(r"codebooks\.(\d+)", name):
        return _codebook(rule.name, int(found[1]), shape)
    layout: tables.Layout = rule.layout
    if name.endswith((".mlp.w1", ".mlp.w2")):
        depths, rows, columns = shape
        layout, shape = PerDepth(depths), (rows, depths * columns)
    elif ".attention.in_proj." in name:
        layout, shape = Stacked(), (shape[0] * shape[1], *shape[2:])
    for pattern, replacement in _HEAD_NAMES:
        name = re.sub(pattern, replacement, name)
    return Rule(rule.name, rule.shape, ((_HEAD + name, shape),), layout)


def _codebook(ours: str, depth: int, shape: Shape) -> Rule:
    part = (f"{_CODEBOOKS}{depth}.weight", (shape[0] + 1, shape[1]))
    return Rule(ours, shape, (part,), WithoutLast())


def _tokenizer_config(
    path: Path, raw: dict[str, Any], shapes: dict[str, Shape], overrides: Sequence[str]
) -> TokenizerConfig:
    depths = _count(shapes, _CODEBOOKS)
    rows = [_shape(path, shapes, f"{_CODEBOOKS}{d}.weight", 2)[0] for d in range(depths)]
    if not rows:
        raise ConversionError(f"{path}: no semantic codebooks ({_CODEBOOKS}0.weight)")
    settings = raw.get("rqvaesiglip") if isinstance(raw.get("rqvaesiglip"), dict) else {}
    return TokenizerConfig(
        kind="semantic",
        vision=_vision(path, shapes, _SIGLIP, overrides),
        feature_layer=settings.get("layer_sem", -2),  # DualToken's; the official code has the -2
        codebook_sizes=tuple(number - 1 for number in rows),
    )


def _tokenizer_rules(config: TokenizerConfig) -> Iterator[Rule]:
    """Rules of the tokenizer's own encoder and of its codebooks."""
    for rule in tables.vision_rules(config.vision):
        parts = tuple(
            (_SIGLIP + name.removeprefix(tables.HF_VISION), shape) for name, shape in rule.parts
        )
        name = f"{TOKENIZER}encoder.{rule.name.removeprefix(tables.VISION)}"
        yield Rule(name, rule.shape, parts)
    for depth, size in enumerate(config.codebook_sizes):
        yield _codebook(f"{TOKENIZER}codebooks.{depth}", depth, (size, config.width))


def _tokenizer(source: Source, config: TokenizerConfig) -> VisualTokenizer:
    def read(name: str) -> Tensor:
        x = source(f"{TOKENIZER}{name}")
        if x is None:
            raise ConversionError(f"{source.path}: the visual tokenizer is incomplete: {name}")
        return check_finite(name, x)

    tokenizer = VisualTokenizer(config)
    assert tokenizer.encoder is not None  # its features are a layer's
    names = tokenizer.encoder.state_dict()
    tokenizer.encoder.load_state_dict({name: read(f"encoder.{name}") for name in names})
    tokenizer.set_codebooks([read(f"codebooks.{d}") for d in range(tokenizer.depth)])
    return tokenizer
