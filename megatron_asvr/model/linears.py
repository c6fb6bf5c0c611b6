"""Every linear that may multiply in 8 bits, by its canonical name, from the configuration alone.

The names are those of the built model, where ``in_8_bits`` puts the products in.
"""

import importlib
from collections.abc import Iterator, Sequence

from torch import nn

from megatron_asvr import platforms, precision
from megatron_asvr.config.schema import Config, LanguageConfig, VisualHeadConfig
from megatron_asvr.model.language import padded_vocab_size
from megatron_asvr.model.sharding import canonical_names
from megatron_asvr.model.tokenizer import VisualTokenizer
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.precision.fp8.emulator import Emulator
from megatron_asvr.precision.fp8.policy import Linear, decide, describe
from megatron_asvr.precision.fp8.watched import Watched


def linears(
    config: Config, codebook_sizes: Sequence[int], code_width: int | None = None
) -> list[Linear]:
    """The linears of the whole model with their widths on one rank, in the order of the model.

    Args:
        config: the run.
        codebook_sizes: codes of every depth; empty without a visual head.
        code_width: width of a codeword; the encoder's by default.
    """
    model, tp = config.model, config.parallel.tp
    hidden, vision = model.language.hidden_size, model.vision.hidden_size
    found = list(_mlp("projector", vision * model.resolution.num_scales, hidden, tp))
    found += _language(model.language, tp)
    if codebook_sizes:
        found += _head(model.visual_head, hidden, codebook_sizes, code_width or vision, tp)
    return found


def precision_lines(
    config: Config, codebook_sizes: Sequence[int], code_width: int | None = None
) -> list[str]:
    """Module by module what multiplies in how many bits, for a person.

    The arguments are those of ``linears``.

    Raises:
        ConfigError: a pattern fits nothing, or a width does not fit the recipe.
    """
    fp8, base = config.precision.fp8, config.train.precision
    if fp8.recipe == "none":
        return [f"precision: {base}"]
    listed = linears(config, codebook_sizes, code_width)
    how = "emulated" if fp8.emulate else "Transformer Engine"
    return [
        f"precision: {base}, and fp8 ({fp8.recipe} scaling, {fp8.format}, {how}) where it says so",
        *describe(listed, decide(listed, fp8), base),
        f"vision_encoder, embeddings, norms: {base}",
        f"attention between positions: {base} (no kernel in 8 bits takes packed documents, "
        "whatever the width of a head)",
        "visual tokenizer, routers of experts, losses: fp32",
    ]


def in_8_bits(
    chunk: nn.Module, config: Config, *, groups: Groups, tokenizer: VisualTokenizer | None
) -> Watched | None:
    """Let the linears of a model chunk multiply in 8 bits, as the run says.

    Returns:
        Those that do; None without 8 bits.

    Args:
        chunk: of the model, with all its parts.
        config: the run.
        groups: process groups of the layout.
        tokenizer: tells the widths of the visual head; None without one.

    Raises:
        ConfigError: 8 bits cannot be had here, or a linear does not fit the recipe.
    """
    platform, settings = platforms.select()[0], config.precision
    engine = precision.select_fp8(platform, chunk.config.params_dtype, settings)[0]
    if engine == "none":
        return None
    described = tokenizer if config.loss.visual_weight else None
    sizes, width = (described.codebook_sizes, described.width) if described else ((), None)
    decided = decide(linears(config, sizes, width), settings.fp8)
    names = _module_names(chunk)
    if engine == "te":
        te = importlib.import_module("megatron_asvr.precision.te")
        found = te.use(chunk, names, decided, settings.fp8)
        return Watched(found, groups=groups, device=platform.device)
    return Emulator(chunk, names, decided, settings.fp8, groups=groups, device=platform.device)


def _module_names(chunk: nn.Module) -> dict[str, str]:
    """Canonical name of every module by its path, where it differs by that of a weight in it."""
    names = {path: path for path, _ in chunk.named_modules()}
    for local, name in canonical_names(chunk).items():
        path, _, parameter = local.rpartition(".")
        fused_norm = parameter.startswith("layer_norm_")  # goes by the name of a module of its own
        if (
            not path.endswith("output_layer") and not fused_norm
        ):  # a tied one goes by the name of the embedding
            names[path] = name.removesuffix(f".{parameter}")
    return names


def _mlp(path: str, inputs: int, width: int, tp: int) -> Iterator[Linear]:
    yield Linear(f"{path}.linear_1", inputs, width // tp)
    yield Linear(f"{path}.linear_2", width // tp, width)


def _language(lm: LanguageConfig, tp: int) -> Iterator[Linear]:
    hidden, heads = lm.hidden_size, lm.num_heads * lm.width_per_head
    packed = (lm.num_heads + 2 * lm.kv_heads) * lm.width_per_head
    for number in range(lm.num_layers):
        layer = f"language_model.decoder.layers.{number}"
        yield Linear(f"{layer}.self_attention.linear_qkv", hidden, packed // tp)
        yield Linear(f"{layer}.self_attention.linear_proj", heads // tp, hidden)
        if lm.is_mixture:  # experts are whole on their ranks
            width = lm.expert_ffn
            parts = [f"{layer}.mlp.experts.local_experts.{n}" for n in range(lm.num_experts or 0)]
        else:
            width, parts = lm.ffn_hidden_size // tp, [f"{layer}.mlp"]
        for part in parts:
            yield Linear(f"{part}.linear_fc1", hidden, 2 * width)
            yield Linear(f"{part}.linear_fc2", width, hidden)
    rows = padded_vocab_size(lm.vocab_size, tp) // tp
    yield Linear("language_model.output_layer", hidden, rows)


def _head(
    head: VisualHeadConfig, hidden: int, sizes: Sequence[int], code_width: int, tp: int
) -> Iterator[Linear]:
    width = head.width
    split = tp if head.heads % tp == 0 else 1  # of the attention, see visual_head.split_attention
    yield from _mlp("visual_head.projector", hidden, width, tp)
    yield Linear("visual_head.code_projection", code_width, width)
    for number in range(head.num_layers):
        layer = f"visual_head.layers.{number}"
        yield Linear(f"{layer}.attention.in_proj", width, 3 * width // split)
        yield Linear(f"{layer}.attention.out_proj", width // split, width)
        for depth in range(len(sizes)):
            yield Linear(f"{layer}.mlp.w1.{depth}", width, 2 * width // tp)
            yield Linear(f"{layer}.mlp.w2.{depth}", 2 * width // tp, width)
    for depth, size in enumerate(sizes):
        yield Linear(f"visual_head.heads.{depth}", width, -(-size // tp))
