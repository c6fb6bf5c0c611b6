"""Floating-point operations of the model's parts, by arithmetic alone: one cost model for all uses.

Pipeline stages are cut by it (stages.py), and the samples of a step are dealt to data-parallel
ranks by it (data/plan.py). It counts products of matrices, forward and backward; what nothing
trained lies below needs no backward pass, and what is frozen no gradient of its weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_asvr.config.schema import Config, LanguageConfig, VisionConfig

LABELLED = 0.5  # share of text positions that have a target


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Operations of both passes, by what causes them.

    Attributes:
        image: of the encoder and the projector, for one image.
        position: of the linears of all layers of the language model, for one position.
        pair: of their attention, for one pair of positions of a document.
        label: of the LM head, for one position with a target.
        visual_head: of the visual head, for one image.
        patches: positions of one image.
    """

    image: float
    position: float
    pair: float
    label: float
    visual_head: float
    patches: int

    def document(self, length: int, images: int) -> float:
        """Operations of one document.

        Args:
            length: its positions, those of its images included.
            images: images that it shows.
        """
        text = max(0, length - images * self.patches)
        layers = self.position * length + self.pair * length**2
        return layers + self.label * LABELLED * text + (self.image + self.visual_head) * images


def rates(config: Config, codebook_sizes: Sequence[int], *, uneven: float = 1.0) -> Rates:
    """The rates of a run.

    Args:
        config: the run.
        codebook_sizes: codes of every depth; empty without a visual head.
        uneven: how much longer images take than their operations, where ranks cannot share them
            evenly.
    """
    lm, vision, trained = config.model.language, config.model.vision, config.train.trainable
    width = lm.hidden_size
    encoder_trained, projector_trained, lm_trained = (
        part in trained for part in ("vision_encoder", "projector", "language_model")
    )
    into_projector = encoder_trained or projector_trained
    into_lm = into_projector or lm_trained
    resolution = config.model.resolution
    feature = vision.hidden_size * resolution.num_scales
    projector = 2.0 * vision.num_patches * width * (feature + width)
    encoder = _both_passes(*_encoder(vision), encoder_trained, encoder_trained)
    linear, attention = _layer(lm)
    again = {"none": (0, 0), "selective": (0, 1), "full": (1, 1)}[config.train.recompute]
    return Rates(
        image=encoder * resolution.num_crops * uneven
        + _both_passes(projector, 0.0, projector_trained, into_projector),
        position=lm.num_layers
        * (_both_passes(linear, 0.0, lm_trained, into_lm) + into_lm * again[0] * linear),
        pair=lm.num_layers
        * (_both_passes(0.0, attention, lm_trained, into_lm) + into_lm * again[1] * attention),
        label=_both_passes(2.0 * width * lm.vocab_size, 0.0, lm_trained, into_lm),
        visual_head=_visual_head(config, codebook_sizes, into_lm, uneven) if codebook_sizes else 0,
        patches=vision.num_patches,
    )


def _both_passes(linear: float, attention: float, trained: bool, backward: bool) -> float:
    """Operations of both passes from those of the forward pass.

    Args:
        linear: with weights; the backward pass has one product for the input's gradient and, when
            trained, one for the weight's.
        attention: products of activations: two gradients.
        trained: the weights are.
        backward: the input needs a gradient.
    """
    return linear * (1 + trained + backward) + attention * (1 + 2 * backward)


def _encoder(vision: VisionConfig) -> tuple[float, float]:
    """Operations of the linears and of attention for one image."""
    n, f = vision.num_patches, vision.hidden_size
    linear = 2.0 * n * f * (4 * f + 2 * vision.ffn_hidden_size)
    return linear * vision.num_feature_layers, 4.0 * n * n * f * vision.num_feature_layers


def _layer(lm: LanguageConfig) -> tuple[float, float]:
    """Operations of a layer's linears at one position, of its (causal) attention for one pair."""
    queries, keys = lm.num_heads * lm.width_per_head, lm.kv_heads * lm.width_per_head
    mlp = 3 * lm.ffn_hidden_size
    if lm.is_mixture:
        mlp = 3 * lm.expert_ffn * lm.experts_per_token + (lm.num_experts or 0)
    return 2.0 * lm.hidden_size * (2 * queries + 2 * keys + mlp), 2.0 * queries


def _visual_head(
    config: Config, codebook_sizes: Sequence[int], below: bool, uneven: float
) -> float:
    """Operations of the visual head and, online, of the tokenizer, for one image."""
    head, vision = config.model.visual_head, config.model.vision
    e, patches, depth = head.width, vision.num_patches, len(codebook_sizes)
    trained = "visual_head" in config.train.trainable
    backward = below or trained
    layers = 2.0 * patches * depth * head.num_layers * 8 * e * e
    attention = 2.0 * patches * depth**2 * head.num_layers * e
    around = config.model.language.hidden_size * e + e * e + e * sum(codebook_sizes)
    around += (depth - 1) * vision.hidden_size * e
    cost = _both_passes(layers + 2.0 * patches * around, attention, trained, backward)
    if config.train.recompute_visual_head and backward:
        cost += layers + attention
    if config.data.codes == "online":
        search = 2.0 * patches * vision.hidden_size * sum(codebook_sizes)
        cost += (sum(_encoder(vision)) + search) * uneven
    return cost
