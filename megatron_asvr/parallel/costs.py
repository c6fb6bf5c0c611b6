"""Floating-point operations of the model's parts, by arithmetic alone: one cost model for all uses.

Pipeline stages are cut by it (stages.py), the samples of a step are dealt to data-parallel ranks by
it (data/plan.py), and a run's log says by it how much of the time was useful (train/work.py). It
counts products of matrices, forward and backward, two operations for each multiplication. What
nothing trained lies below needs no backward pass, what is frozen no gradient of its weights, and
attention is causal. ``tests/unit/test_costs.py`` holds it against what torch counts in the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_asvr.config.schema import Config, LanguageConfig, VisionConfig

LABELLED = 0.5  # share of text positions that have a target, where nobody has counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What some samples hold, without padding.

    Attributes:
        images: that the encoder gets (views of pictures).
        patches: positions that show a patch of an image.
        positions: of all documents.
        pairs: of a position and one that it attends to, which may be itself.
        labels: positions with a text target.
        codes: positions with a visual target.
    """

    images: float
    patches: float
    positions: float
    pairs: float
    labels: float
    codes: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Operations of both passes, by what causes them.

    Attributes:
        encoder: of the vision encoder, for one image.
        tokenizer: of the visual tokenizer where it is online, for one image.
        projector: for one patch.
        position: of the linears of all layers of the language model, for one position.
        pair: of their attention, for one pair of positions.
        label: of the LM head, for one position with a target.
        code: of the visual head, all its depths, for one position with codes.
        num_patches: positions of one image.
    """

    encoder: float
    tokenizer: float
    projector: float
    position: float
    pair: float
    label: float
    code: float
    num_patches: int

    def parts(self, counts: Counts) -> dict[str, float]:
        """Operations of every part of the model."""
        return {
            "encoder": self.encoder * counts.images,
            "tokenizer": self.tokenizer * counts.images,
            "projector": self.projector * counts.patches,
            "language_model": self.position * counts.positions + self.pair * counts.pairs,
            "text_head": self.label * counts.labels,
            "visual_head": self.code * counts.codes,
        }

    def document(self, length: int, images: int) -> float:
        """Operations of one document of which nothing else is known.

        Args:
            length: its positions, those of its images included.
            images: images that it shows.
        """
        return sum(self.parts(self.typical(length, images)).values())

    def typical(self, length: int, images: int) -> Counts:
        """What such a document holds; the arguments are those of ``document``."""
        patches = images * self.num_patches
        return Counts(
            images=images,
            patches=patches,
            positions=length,
            pairs=length * (length + 1) / 2,
            labels=LABELLED * max(0, length - patches),
            codes=patches,
        )


def rates(
    config: Config,
    codebook_sizes: Sequence[int],
    *,
    useful: bool = False,
    code_width: int | None = None,
) -> Rates:
    """The rates of a run.

    Args:
        config: the run.
        codebook_sizes: codes of every depth; empty without a visual head.
        useful: leave out what is computed again.
        code_width: of a code vector; the encoder's width by default.
    """
    lm, vision, trained = config.model.language, config.model.vision, config.train.trainable
    width = lm.hidden_size
    encoder, projector, language = (
        part in trained for part in ("vision_encoder", "projector", "language_model")
    )
    into_projector = encoder or projector
    into_lm = into_projector or language
    feature = vision.hidden_size * config.model.resolution.num_scales
    linear, attention = _layer(lm)
    again = {"none": (0, 0), "selective": (0, 1), "full": (1, 1)}[config.train.recompute]
    repeats = [into_lm and not useful and times for times in again]
    online = bool(codebook_sizes) and config.data.codes == "online"
    crops = config.model.resolution.num_crops if config.data.features == "online" else 0
    return Rates(
        encoder=encoder_cost(vision, trained=encoder) * crops,
        tokenizer=tokenizer_cost(config, codebook_sizes, vision, code_width) if online else 0.0,
        projector=2.0 * width * feature * (1 + projector + encoder)
        + 2.0 * width * width * (1 + projector + into_projector),
        position=lm.num_layers * linear * (1 + language + into_lm + repeats[0]),
        pair=lm.num_layers * attention * (1 + 2 * into_lm + repeats[1]),
        label=2.0 * width * lm.vocab_size * (1 + language + into_lm),
        code=config.loss.visual_positions
        * _visual_head(config, codebook_sizes, code_width, into_lm, useful)
        if codebook_sizes
        else 0.0,
        num_patches=vision.num_patches,
    )


def encoder_cost(vision: VisionConfig, *, trained: bool = False) -> float:
    """Operations of a vision encoder for one image.

    Args:
        vision: the encoder; layers above the selected one never run.
        trained: with a backward pass, which ends at the pixels.
    """
    n, f, layers = vision.num_patches, vision.hidden_size, vision.num_feature_layers
    cut = 2.0 * n * f * 3 * vision.patch_size**2
    linear = 2.0 * n * f * (4 * f + 2 * vision.ffn_hidden_size)
    return cut * (1 + trained) + layers * (linear + 4.0 * n * n * f) * (1 + 2 * trained)


def tokenizer_cost(
    config: Config,
    codebook_sizes: Sequence[int],
    encoder: VisionConfig | None,
    code_width: int | None = None,
) -> float:
    """Operations of the visual tokenizer for one image: its encoder, and the search for codes.

    Args:
        config: the run.
        codebook_sizes: codes of every depth.
        encoder: of the tokenizer; None where pixels are quantised.
        code_width: of a code vector; the model's encoder's width by default.
    """
    vision = config.model.vision
    width = code_width or vision.hidden_size
    search = 2.0 * vision.num_patches * width * sum(codebook_sizes)
    return search + (encoder_cost(encoder) if encoder is not None else 0.0)


def _layer(lm: LanguageConfig) -> tuple[float, float]:
    """Operations of a layer's linears at one position, and of its attention for one pair."""
    queries, keys = lm.num_heads * lm.width_per_head, lm.kv_heads * lm.width_per_head
    mlp = 3 * lm.ffn_hidden_size
    if lm.is_mixture:
        mlp = 3 * lm.expert_ffn * lm.experts_per_token + (lm.num_experts or 0)
    return 2.0 * lm.hidden_size * (2 * queries + 2 * keys + mlp), 4.0 * queries


def _visual_head(
    config: Config, sizes: Sequence[int], code_width: int | None, below: bool, useful: bool
) -> float:
    """Operations of the visual head, at one position.

    Args:
        config: the run.
        sizes: codes of every depth.
        code_width: of a code vector.
        below: something trained lies below the head.
        useful: leave out what is computed again.
    """
    head, hidden, depth = config.model.visual_head, config.model.language.hidden_size, len(sizes)
    e, trained = head.width, "visual_head" in config.train.trainable
    backward = below or trained
    start = 2.0 * hidden * e * (1 + trained + below) + 2.0 * e * e * (1 + trained + backward)
    # Code vectors are constants: the backward pass ends there.
    codes = 2.0 * (depth - 1) * (code_width or config.model.vision.hidden_size) * e * (1 + trained)
    linear = head.num_layers * 2.0 * depth * 8 * e * e
    attention = head.num_layers * 4.0 * e * depth * (depth + 1) / 2
    again = backward and config.train.recompute_visual_head and not useful
    layers = linear * (1 + trained + backward + again) + attention * (1 + 2 * backward + again)
    return start + codes + layers + 2.0 * e * sum(sizes) * (1 + trained + backward)
