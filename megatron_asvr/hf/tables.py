"""One table per family: which Hugging Face tensors hold the numbers of which of ours.

A `Rule` is one of our tensors (global name, full shape) and the Hugging Face tensors it is made of,
in order, with their shapes. `Rule.join` goes one way and `Rule.split` the other, so import and
export cannot disagree. The Hugging Face names are those of a LLaVA checkpoint on disk
(``language_model.model...``, ``vision_tower.vision_model...``, ``multi_modal_projector...``);
text-only and vision-only folders are the same tensors under a shorter prefix. The visual head has
no Hugging Face counterpart: in its own file it keeps our names without the prefix.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_asvr.config.schema import LanguageConfig, ModelConfig, VisionConfig, VisualHeadConfig
from megatron_asvr.errors import ConversionError

Shape = tuple[int, ...]
Run = tuple[int, int, int]  # part, its first element, number of elements
Read = Callable[[str], Tensor | None]
LM, HF_LM = "language_model.", "language_model."
VISION, HF_VISION = "vision_encoder.", "vision_tower.vision_model."
PROJECTOR, HF_PROJECTOR = "projector.", "multi_modal_projector."
HEAD = "visual_head."
NEWLINE = "image_newline"
SHOWN_OFFENDERS = 5


class Layout(Protocol):
    """How one of our tensors is laid out from its Hugging Face parts."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """Our tensor, from its parts."""
        ...

    def split(self, x: Tensor) -> list[Tensor]:
        """The parts of our tensor; ``join`` undoes it."""
        ...

    def runs(self, shape: Shape, parts: list[Shape]) -> Iterator[Run]:
        """Where the elements of our flat tensor lie in the flat parts, in the order of ours."""
        ...


@dataclass(frozen=True, slots=True)
class Same:
    """One part, unchanged."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """Our tensor."""
        return parts[0]

    def split(self, x: Tensor) -> list[Tensor]:
        """The parts."""
        return [x]

    def runs(self, shape: Shape, parts: list[Shape]) -> Iterator[Run]:
        """Where our elements lie."""
        yield 0, 0, math.prod(shape)


@dataclass(frozen=True, slots=True)
class Halves:
    """Two equal parts stacked on axis 0: the gate above the up projection."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """Our tensor."""
        return torch.cat(parts)

    def split(self, x: Tensor) -> list[Tensor]:
        """The parts."""
        return list(x.chunk(2))

    def runs(self, shape: Shape, parts: list[Shape]) -> Iterator[Run]:
        """Where our elements lie."""
        for number, part in enumerate(parts):
            yield number, 0, math.prod(part)


@dataclass(frozen=True, slots=True)
class GroupedQkv:
    """megatron-core's fused projection: per key/value head, its query heads, then k, then v.

    Source: megatron-core 0.16.1, core/transformer/attention.py, get_query_key_value_tensors.
    """

    groups: int  # key/value heads
    queries: int  # query heads of one group
    width: int  # of one head

    def join(self, parts: list[Tensor]) -> Tensor:
        """Our tensor."""
        rest = parts[0].shape[1:]
        grouped = [p.reshape(self.groups, -1, *rest) for p in parts]
        return torch.cat(grouped, dim=1).reshape(-1, *rest)

    def split(self, x: Tensor) -> list[Tensor]:
        """The parts."""
        rest = x.shape[1:]
        grouped = x.reshape(self.groups, (self.queries + 2) * self.width, *rest)
        parts = grouped.split([self.queries * self.width, self.width, self.width], dim=1)
        return [p.reshape(-1, *rest) for p in parts]

    def runs(self, shape: Shape, parts: list[Shape]) -> Iterator[Run]:
        """Where our elements lie."""
        head = self.width * math.prod(shape[1:])
        for group in range(self.groups):
            for part, size in enumerate((self.queries * head, head, head)):
                yield part, group * size, size


@dataclass(frozen=True, slots=True)
class Experts:
    """What Hugging Face calls the parts of a layer's mixture of experts.

    Attributes:
        router: its weight.
        expert: prefix of one expert, with a place for its number.
        linears: gate, up and down projection of an expert.
    """

    router: str
    expert: str
    linears: tuple[str, str, str]


EXPERTS = {
    "mixtral": Experts(
        "block_sparse_moe.gate.weight", "block_sparse_moe.experts.{}.", ("w1", "w3", "w2")
    ),
    "qwen3_moe": Experts(
        "mlp.gate.weight", "mlp.experts.{}.", ("gate_proj", "up_proj", "down_proj")
    ),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """One of our tensors and the Hugging Face tensors that hold the same numbers.

    Attributes:
        name: our global name.
        shape: our full, unpadded shape.
        parts: Hugging Face name and shape of each part, in the order of ``layout``.
        layout: how the parts make up the whole.
    """

    name: str
    shape: Shape
    parts: tuple[tuple[str, Shape], ...]
    layout: Layout = Same()

    def join(self, read: Callable[[str], Tensor]) -> Tensor:
        """Our tensor, from a reader of Hugging Face tensors (shapes already checked)."""
        return self.layout.join([read(name) for name, _ in self.parts])

    def split(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Hugging Face names and tensors of ``x``, which has ``self.shape``."""
        return zip((name for name, _ in self.parts), self.layout.split(x), strict=True)

    def cut(self, start: int, end: int) -> Iterator[tuple[str, int, slice]]:
        """Where the elements from ``start`` to ``end`` of our flat tensor lie.

        Returns:
            Hugging Face name, first element there, and place among the elements asked for.
        """
        at = 0
        for part, begin, number in self.layout.runs(self.shape, [shape for _, shape in self.parts]):
            low, high = max(start, at), min(end, at + number)
            if low < high:
                yield self.parts[part][0], begin + low - at, slice(low - start, high - start)
            at += number


def text_rules(language: LanguageConfig) -> list[Rule]:
    """Rules of a language model of any family; tied embeddings appear once."""
    vocab, width = language.vocab_size, language.hidden_size
    rules = [_text("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocab, width)]
    for i in range(language.num_layers):
        rules += _text_layer(language, i)
    rules.append(_text("decoder.final_layernorm.weight", "model.norm.weight", width))
    if not language.tied_embeddings:
        rules.append(_text("output_layer.weight", "lm_head.weight", vocab, width))
    return rules


def _text(ours: str, theirs: str, *shape: int) -> Rule:
    return Rule(LM + ours, shape, ((HF_LM + theirs, shape),))


def _text_layer(language: LanguageConfig, i: int) -> list[Rule]:
    ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
    width, head = language.hidden_size, language.width_per_head
    q, kv = language.num_heads * head, language.kv_heads * head
    layout = GroupedQkv(language.kv_heads, language.num_heads // language.kv_heads, head)

    def qkv(kind: str, *rest: int) -> Rule:
        sizes = (("q_proj", q), ("k_proj", kv), ("v_proj", kv))
        parts = tuple((f"{HF_LM}{theirs}self_attn.{p}.{kind}", (n, *rest)) for p, n in sizes)
        return Rule(
            f"{LM}{ours}self_attention.linear_qkv.{kind}", (q + 2 * kv, *rest), parts, layout
        )

    attention, norms = f"{ours}self_attention.", ("q", "k") if language.qk_norm else ()
    return [
        _text(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", width),
        qkv("weight", width),
        *([qkv("bias")] if language.qkv_bias else []),
        *(
            _text(f"{attention}{x}_layernorm.weight", f"{theirs}self_attn.{x}_norm.weight", head)
            for x in norms
        ),
        _text(f"{attention}linear_proj.weight", f"{theirs}self_attn.o_proj.weight", width, q),
        _text(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight", width),
        *_feed_forward(language, ours, theirs),
    ]


def _feed_forward(language: LanguageConfig, ours: str, theirs: str) -> Iterator[Rule]:
    """Rules of a layer's feed-forward part, or of its router and all its experts."""
    width = language.hidden_size
    if not language.is_mixture:
        linears = ("gate_proj", "up_proj", "down_proj")
        yield from _mlp(f"{ours}mlp.", f"{theirs}mlp.", linears, width, language.ffn_hidden_size)
        return
    names, number = EXPERTS[language.family], language.num_experts or 0
    yield _text(f"{ours}mlp.router.weight", theirs + names.router, number, width)
    for e in range(number):
        expert = f"{ours}mlp.experts.local_experts.{e}."
        theirs_of = theirs + names.expert.format(e)
        yield from _mlp(expert, theirs_of, names.linears, width, language.expert_ffn)


def _mlp(
    ours: str, theirs: str, linears: tuple[str, str, str], width: int, ffn: int
) -> Iterator[Rule]:
    gate, up, down = (f"{theirs}{linear}.weight" for linear in linears)
    parts = tuple((HF_LM + name, (ffn, width)) for name in (gate, up))
    yield Rule(f"{LM}{ours}linear_fc1.weight", (2 * ffn, width), parts, Halves())
    yield _text(f"{ours}linear_fc2.weight", down, width, ffn)


def _renamed(ours: str, theirs: str, shapes: Iterable[tuple[str, Shape]]) -> list[Rule]:
    return [Rule(ours + name, shape, ((theirs + name, shape),)) for name, shape in shapes]


def _linear(name: str, out_width: int, in_width: int) -> list[tuple[str, Shape]]:
    return [(f"{name}.weight", (out_width, in_width)), (f"{name}.bias", (out_width,))]


def vision_rules(vision: VisionConfig) -> list[Rule]:
    """Rules of a SigLIP vision tower without its pooling head: all layers, and the last norm."""
    width, ffn, patch = vision.hidden_size, vision.ffn_hidden_size, vision.patch_size

    def norm(name: str) -> list[tuple[str, Shape]]:
        return [(f"{name}.weight", (width,)), (f"{name}.bias", (width,))]

    shapes: list[tuple[str, Shape]] = [
        ("embeddings.patch_embedding.weight", (width, 3, patch, patch)),
        ("embeddings.patch_embedding.bias", (width,)),
        ("embeddings.position_embedding.weight", (vision.num_patches, width)),
    ]
    for i in range(vision.num_layers):
        layer = f"encoder.layers.{i}."
        shapes += norm(f"{layer}layer_norm1") + norm(f"{layer}layer_norm2")
        for x in "q", "k", "v", "out":
            shapes += _linear(f"{layer}self_attn.{x}_proj", width, width)
        shapes += _linear(f"{layer}mlp.fc1", ffn, width) + _linear(f"{layer}mlp.fc2", width, ffn)
    return _renamed(VISION, HF_VISION, shapes + norm("post_layernorm"))


def projector_rules(model: ModelConfig) -> list[Rule]:
    """Rules of the projector from encoder features to the language model's width."""
    out = model.language.hidden_size
    feature = model.vision.hidden_size * model.resolution.num_scales
    shapes = _linear("linear_1", out, feature) + _linear("linear_2", out, out)
    rules = _renamed(PROJECTOR, HF_PROJECTOR, shapes)
    if model.resolution.newline:
        rules.append(Rule(PROJECTOR + NEWLINE, (out,), ((NEWLINE, (out,)),)))
    return rules


def llava_rules(model: ModelConfig) -> list[Rule]:
    """Rules of everything a stock LLaVA model holds."""
    return [*vision_rules(model.vision), *projector_rules(model), *text_rules(model.language)]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSizes:
    """What the visual head's shapes need beyond the run's configuration.

    Attributes:
        codebook_sizes: codes of each depth.
        code_width: width of a code vector.
        with_codebooks: whether the frozen codebooks travel with the head.
    """

    codebook_sizes: tuple[int, ...]
    code_width: int
    with_codebooks: bool = False


def visual_head_rules(head: VisualHeadConfig, hidden_size: int, sizes: HeadSizes) -> list[Rule]:
    """Rules of the visual head, whose file holds our names without ``visual_head.``."""
    width, depths = head.width, len(sizes.codebook_sizes)
    shapes = _linear("projector.linear_1", width, hidden_size)
    shapes += _linear("projector.linear_2", width, width)
    shapes += _linear("code_projection", width, sizes.code_width)
    for i in range(head.num_layers):
        layer = f"layers.{i}."
        shapes += [
            (f"{layer}norm1.weight", (width,)),
            (f"{layer}norm2.weight", (width,)),
            (f"{layer}attention.in_proj.weight", (3, width, width)),
            (f"{layer}attention.in_proj.bias", (3, width)),
            *_linear(f"{layer}attention.out_proj", width, width),
            (f"{layer}mlp.w1", (depths, 2 * width, width)),
            (f"{layer}mlp.w2", (depths, width, 2 * width)),
        ]
    shapes.append(("norm.weight", (width,)))
    for d, size in enumerate(sizes.codebook_sizes):
        shapes += _linear(f"heads.{d}", size, width)
        if sizes.with_codebooks:
            shapes.append((f"codebooks.{d}", (size, sizes.code_width)))
    return _renamed(HEAD, "", shapes)


def source_shapes(rules: Iterable[Rule]) -> dict[str, Shape]:
    """Hugging Face names and shapes of all parts of ``rules``."""
    return {name: shape for rule in rules for name, shape in rule.parts}


def check_complete(where: str, got: dict[str, Shape], wanted: dict[str, Shape]) -> None:
    """Return when both sides have the same names with the same shapes.

    Raises:
        ConversionError: with the counts and the first offenders.
    """
    missing = [name for name in wanted if name not in got]
    extra = [name for name in got if name not in wanted]
    wrong = [
        f"{name} {list(got[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in got and tuple(got[name]) != tuple(shape)
    ]
    found = (("missing", missing), ("unexpected", extra), ("wrong shape", wrong))
    problems = [f"{len(names)} {what}: {_first(names)}" for what, names in found if names]
    if problems:
        raise ConversionError(
            f"{where}: {'; '.join(problems)}. The configuration asks for {len(wanted)} tensors; "
            "check that weights and configuration belong to the same model"
        )


def _first(names: list[str]) -> str:
    more = f", ... and {len(names) - SHOWN_OFFENDERS} more" if len(names) > SHOWN_OFFENDERS else ""
    return ", ".join(names[:SHOWN_OFFENDERS]) + more
