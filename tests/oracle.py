"""The recorded runs of the official code: weights, inputs as micro-batches, and comparisons.

The inputs enter below the data pipeline, because some of them do what the pipeline refuses to do
(truncate through an image, give a text-only sample a dummy image).
"""

import functools
import json
import pathlib
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_asvr.batch import IGNORE, NO_POSITION, MicroBatch
from megatron_asvr.config.schema import (
    Config,
    DataConfig,
    LanguageConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
    VisionConfig,
    VisualHeadConfig,
)
from megatron_asvr.model import sharding
from megatron_asvr.model.asvr import AsvrModel
from megatron_asvr.model.loss import LossSums, joint_loss, official_loss
from megatron_asvr.model.tokenizer import TokenizerConfig, VisualTokenizer
from megatron_asvr.parallel.groups import Groups
from tests.asvr_cases import share_of

FOLDER = pathlib.Path(__file__).parent / "golden" / "oracle_d4"
MAX_FULL = 8192  # larger gradients are kept as sketches
IMAGE_TOKEN = -200
WITH_GRADIENTS = ("one_each", "mixed")  # and with values of the repaired code

LANGUAGE = LanguageConfig(
    hidden_size=64,
    num_layers=4,
    num_heads=4,
    ffn_hidden_size=160,
    vocab_size=512,
    max_positions=256,
)
VISION = VisionConfig(
    hidden_size=64, num_layers=6, num_heads=4, ffn_hidden_size=128, image_size=56, patch_size=14
)


@functools.cache
def expected() -> dict[str, dict]:
    return json.loads((FOLDER / "expected.json").read_text())


@functools.cache
def _tensors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def cases() -> list[str]:
    """The cases in which the official code does not raise."""
    return [case for case, values in expected().items() if "error" not in values]


def inputs(case: str) -> dict[str, Tensor]:
    prefix = f"{case}."
    found = _tensors("cases").items()
    return {name.removeprefix(prefix): x for name, x in found if name.startswith(prefix)}


def config(mode: str, *, codes: str = "online") -> Config:
    return Config(
        model=ModelConfig(
            language=LANGUAGE,
            vision=VISION,
            visual_head=VisualHeadConfig(width=128, num_layers=3),
        ),
        loss=LossConfig(mode=mode),
        data=DataConfig(codes=codes),
        train=TrainConfig(precision="fp32"),
    )


def tokenizer() -> VisualTokenizer:
    description = TokenizerConfig(
        kind="semantic", vision=VISION, feature_layer=-2, codebook_sizes=(64,) * 4
    )
    built = VisualTokenizer(description)
    weights = _tensors("weights")
    with torch.no_grad():
        for name, parameter in built.encoder.named_parameters():
            # The layer above the features is not in the files; NaN proves that it is not used.
            parameter.copy_(weights.get(f"tok_siglip.{name}", torch.tensor(float("nan"))))
    built.set_codebooks([weights[f"codebook.{depth}"] for depth in range(4)])
    return built


def canonical_weight(name: str) -> Tensor | None:
    """The recorded weight under one of this project's canonical names."""
    return to_canonical(_tensors("weights"), name)


def to_canonical(plain: dict[str, Tensor], name: str) -> Tensor | None:
    part, _, rest = name.partition(".")
    if part == "vision_encoder":
        return plain.get(f"tower.{rest}", torch.full(_encoder_shape(rest), float("nan")))
    if part == "projector":
        return plain[f"mm_projector.{rest.replace('linear_', 'fc')}"]
    if part == "visual_head":
        return _head_weight(plain, rest)
    return _language_weight(plain, rest)


def _encoder_shape(name: str) -> tuple[int, ...]:
    """Shape of a weight of the unused last layer: that of the first layer."""
    like = name.replace("encoder.layers.5.", "encoder.layers.0.")
    if like.startswith("post_layernorm"):
        return (VISION.hidden_size,)
    return tuple(_tensors("weights")[f"tower.{like}"].shape)


def _head_weight(plain: dict[str, Tensor], name: str) -> Tensor:
    if name.startswith("projector."):
        return plain[f"head.{name.replace('linear_', 'fc')}"]
    old = {"code_projection.": "in_proj.", "heads.": "out.", "attention.": "attn.", "mlp.": ""}
    plain_name = name
    for ours, theirs in old.items():
        plain_name = plain_name.replace(ours, theirs)
    x = plain[f"head.{plain_name}"]
    width = plain["head.norm.weight"].shape[0]
    if name.endswith("mlp.w1"):  # [2 E, E * D] -> [D, 2 E, E]
        return x.view(2 * width, -1, width).transpose(0, 1)
    if name.endswith("mlp.w2"):  # [E, 2 E * D] -> [D, E, 2 E]
        return x.view(width, -1, 2 * width).transpose(0, 1)
    if ".in_proj." in name:  # [3 E, ..] -> [3, E, ..]
        return x.unflatten(0, (3, width))
    return x


def _language_weight(plain: dict[str, Tensor], name: str) -> Tensor:
    fixed = {
        "embedding.word_embeddings.weight": "llm.embed_tokens.weight",
        "decoder.final_layernorm.weight": "llm.norm.weight",
        "output_layer.weight": "lm_head.weight",
    }
    if name in fixed:
        return plain[fixed[name]]
    _, _, number, rest = name.split(".", 3)
    layer = f"llm.layers.{number}."
    if rest == "self_attention.linear_qkv.weight":  # head by head: its q, its k, its v
        parts = [plain[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv"]
        heads = [part.unflatten(0, (LANGUAGE.num_heads, -1)) for part in parts]
        return torch.cat(heads, 1).flatten(0, 1)
    if rest == "mlp.linear_fc1.weight":
        return torch.cat([plain[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up")])
    names = {
        "input_layernorm.weight": "input_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    }
    return plain[layer + names[rest]]


def to_plain(canonical: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the trained parts under the plain names of the files."""
    plain = {}
    for name, x in canonical.items():
        part, _, rest = name.partition(".")
        if part == "projector":
            plain[f"mm_projector.{rest.replace('linear_', 'fc')}"] = x
        elif part == "visual_head":
            plain |= _plain_head(rest, x)
        elif part == "language_model":
            plain |= _plain_language(rest, x)
    return plain


def _plain_head(name: str, x: Tensor) -> dict[str, Tensor]:
    if name.startswith("projector."):
        return {f"head.{name.replace('linear_', 'fc')}": x}
    if name.endswith(("mlp.w1", "mlp.w2")):
        return {f"head.{name.replace('mlp.', '')}": x.transpose(0, 1).flatten(1)}
    if ".in_proj." in name:
        x = x.flatten(0, 1)
    old = {"code_projection.": "in_proj.", "heads.": "out.", "attention.": "attn."}
    for ours, theirs in old.items():
        name = name.replace(ours, theirs)
    return {f"head.{name}": x}


def _plain_language(name: str, x: Tensor) -> dict[str, Tensor]:
    fixed = {
        "embedding.word_embeddings.weight": "llm.embed_tokens.weight",
        "decoder.final_layernorm.weight": "llm.norm.weight",
        "output_layer.weight": "lm_head.weight",
    }
    if name in fixed:
        return {fixed[name]: x}
    _, _, number, rest = name.split(".", 3)
    layer = f"llm.layers.{number}."
    if rest == "self_attention.linear_qkv.weight":
        parts = x.unflatten(0, (LANGUAGE.num_heads, 3, -1)).unbind(1)
        named = zip("qkv", parts, strict=True)
        return {f"{layer}self_attn.{k}_proj.weight": part.flatten(0, 1) for k, part in named}
    if rest == "mlp.linear_fc1.weight":
        gate, up = x.chunk(2)
        return {f"{layer}mlp.gate_proj.weight": gate, f"{layer}mlp.up_proj.weight": up}
    names = {
        "input_layernorm.weight": "input_layernorm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    }
    return {layer + names[rest]: x}


def micro_batch(case: str, mode: str) -> MicroBatch:
    """A recorded input as the official code arranges it, with all pixels.

    Official: a sample without ``<image>`` consumes a dummy image whose patches have no place;
    embeddings are cut at the maximal length after splicing, targets are not. Exact: dummy images
    do not exist (the cases that cut an image have no exact form).
    """
    given = inputs(case)
    pixels = given.get("images")
    crops = 1
    if pixels is not None and pixels.dim() == 5:
        crops = pixels.shape[1]
        pixels = pixels.flatten(0, 1)
    max_length = expected()[case]["tokenizer_model_max_length"]
    rows, kept_images, next_image = [], [], 0
    for ids, labels, mask in zip(
        given["input_ids"], given["labels"], given["attention_mask"], strict=True
    ):
        row = _expand(ids[mask.bool()], labels[mask.bool()], crops * VISION.num_patches)
        if pixels is not None and not row["spans"]:
            if mode == "official":
                row["spans"] = [None]
            else:
                next_image += crops
        for _ in row["spans"]:
            kept_images += range(next_image, next_image + crops)
            next_image += crops
        rows.append(row)
    length = min(max_length, max(len(row["tokens"]) for row in rows))
    return _assemble(rows, length, pixels[kept_images] if kept_images else None)


def _expand(ids: Tensor, labels: Tensor, patches: int) -> dict:
    """One sample with every ``<image>`` replaced by its patches, and where those start."""
    tokens, targets, spans = [], [], []
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        if token == IMAGE_TOKEN:
            spans.append(range(len(tokens), len(tokens) + patches))
            tokens += [0] * patches
            targets += [IGNORE] * patches
        else:
            tokens.append(token)
            targets.append(label)
    return {"tokens": tokens, "labels": targets, "spans": spans}


def _assemble(rows: list[dict], length: int, pixels: Tensor | None) -> MicroBatch:
    tokens, targets, documents, places = [], [], [], []
    for b, row in enumerate(rows):
        used = min(length, len(row["tokens"]))
        padding = length - used
        tokens.append(row["tokens"][:used] + [0] * padding)
        shifted = [*row["labels"][1:used], IGNORE]
        targets.append(shifted + [IGNORE] * padding)
        documents.append([0] * used + [-1] * padding)
        for span in row["spans"]:
            if span is None:
                places += [NO_POSITION] * VISION.num_patches
            else:
                places += [b * length + s if s < used else NO_POSITION for s in span]
    positions_P = torch.tensor(places, dtype=torch.int64)
    inside_P = positions_P != NO_POSITION
    num_images = 0 if pixels is None else len(pixels)
    document_BS = torch.tensor(documents, dtype=torch.int32)
    return MicroBatch(
        tokens_BS=torch.tensor(tokens),
        position_ids_BS=torch.arange(length).repeat(len(rows), 1),
        text_targets_BS=torch.tensor(targets),
        document_BS=document_BS,
        branch_BS=torch.zeros_like(document_BS),
        index_BS=torch.arange(length).repeat(len(rows), 1),
        image_positions_P=positions_P[inside_P],
        image_patches_P=inside_P.nonzero().squeeze(1),
        pixel_values_ICHW=pixels,
        image_share=(0, num_images),
        num_images=num_images,
        visual_positions_M=positions_P.clone(),
        visual_patches_M=torch.arange(len(places)),
        codes_PD=None,
        sample_ids=[str(b) for b in range(len(rows))],
    )


def sketch(gradient: Tensor) -> Tensor:
    """fp64 [8192]: signed sums of the elements in pseudo-random buckets (a count sketch).

    The squared norm of a sketch is that of the tensor, in expectation and within a few per cent.
    """
    index = torch.arange(gradient.numel(), dtype=torch.int64)
    for shift, factor in ((16, 0x45D9F3B), (15, 0x119DE1F3), (16, 1)):
        index = ((index ^ (index >> shift)) * factor) & 0x7FFFFFFF
    values = gradient.detach().flatten().double() * (1 - 2 * (index & 1))
    return torch.zeros(MAX_FULL, dtype=torch.float64).index_add_(0, (index >> 1) % MAX_FULL, values)


def worst_gradient(case: str, gradients: dict[str, Tensor]) -> tuple[float, str]:
    """Largest ||g - g'|| / max(||g'||, 1e-3 ||g'_all||) over the parameters, and whose it is.

    Args:
        case: one of the cases with recorded gradients.
        gradients: by plain name; they must be exactly the recorded ones.
    """
    recorded = _tensors("gradients")
    names = {n.split(f"{case}.", 1)[1] for n in recorded if f"{case}." in n}
    assert names == set(gradients)
    norms = expected()[case]["grad_norms"]
    floor = 1e-3 * sum(x * x for x in norms.values()) ** 0.5
    ratios = {}
    for name, gradient in gradients.items():
        wanted = recorded.get(f"{case}.{name}")
        if wanted is None:
            wanted, gradient = recorded[f"sketch.{case}.{name}"].double(), sketch(gradient)
        difference = (gradient.reshape(wanted.shape) - wanted).norm().item()
        ratios[name] = difference / max(norms[name], floor)
    name = max(ratios, key=ratios.get)
    return ratios[name], name


def worst_norm(wanted: dict[str, float], gradients: dict[str, Tensor]) -> tuple[float, str]:
    """Largest difference of gradient norms, relative as in ``worst_gradient``.

    Parameters without a recorded norm must have a zero gradient.
    """
    floor = 1e-3 * sum(x * x for x in wanted.values()) ** 0.5
    assert set(wanted) <= set(gradients)
    ratios = {
        name: abs(gradient.double().norm().item() - wanted.get(name, 0.0))
        / max(wanted.get(name, 0.0), floor)
        for name, gradient in gradients.items()
    }
    name = max(ratios, key=ratios.get)
    return ratios[name], name


@dataclass(kw_only=True)
class Run:
    """What this project computes for a recorded case."""

    loss: float
    sums: LossSums
    codes_PD: Tensor
    gradients: dict[str, Tensor]  # by plain name


def run(case: str, mode: str, groups: Groups) -> Run:
    """Forward and backward pass of a case on this rank of the layout; a collective."""
    model = AsvrModel(config(mode), groups=groups, tokenizer=tokenizer())
    sharding.load_weights(model, canonical_weight, groups=groups)
    batch = share_of(micro_batch(case, mode), groups.tp_rank, groups.plan.tp)
    sums = model(batch)
    if mode == "official":
        loss = official_loss(sums, visual_weight=1.0)
    else:
        loss = joint_loss(
            sums,
            global_text_count=sums.text_count,
            global_visual_count=sums.visual_count,
            visual_weight=1.0,
        )
    loss.backward()
    codes_PD = model.images.codes(batch)
    return Run(
        loss=loss.item(),
        sums=sums,
        codes_PD=codes_PD,
        gradients=to_plain(full_gradients(model, groups)),
    )


def full_gradients(model: torch.nn.Module, groups: Groups) -> dict[str, Tensor]:
    """Full gradients of the trained parameters by canonical name; overwrites the weights."""
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                assert parameter.grad is not None, f"{name} has no gradient"
                parameter.copy_(parameter.grad)
    names = sharding.canonical_names(model)
    wanted = {names[name] for name in trained}
    state = sharding.full_state(model, groups=groups)
    return {name: x.clone() for name, x in state if name in wanted}


def check_official(case: str, got: Run) -> None:
    """Codes, losses and gradient norms of the official code."""
    wanted = expected()[case]
    codes = inputs(case).get("codes")
    if codes is not None:
        assert torch.equal(got.codes_PD, codes.flatten(0, 1))
        # measured 5e-7
        per_depth = got.sums.visual_sum_D / got.sums.visual_count
        torch.testing.assert_close(
            per_depth, torch.tensor(wanted["vision_ce_per_depth"]), rtol=0, atol=1e-5
        )
    assert got.sums.text_count == wanted["n_text_targets"]
    assert got.loss == approx(wanted["loss"])
    ratio, name = worst_norm(wanted["grad_norms"], got.gradients)
    assert ratio < 1e-5, name


def check_exact(case: str, got: Run) -> None:
    """Losses and gradient norms of the official code with its two bugs repaired."""
    wanted = expected()[case]
    assert got.loss == approx(wanted["fixed_loss"])
    visual = got.sums.visual_sum_D.mean() / got.sums.visual_count
    assert visual.item() == approx(wanted["fixed_loss_vision"])
    ratio, name = worst_norm(wanted["grad_norms_fixed"], got.gradients)
    assert ratio < 1e-5, name


def approx(value: float) -> object:
    """``value`` within 1e-5, NaN being equal to itself."""
    return pytest.approx(value, rel=0, abs=1e-5, nan_ok=True)
