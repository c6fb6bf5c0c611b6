"""What the images of a micro-batch give: features for the model, and codes as targets.

Every rank of a tensor- and context-parallel group encodes its own share of the images, and the
results are gathered. Where the model's encoder and the visual tokenizer's are the same network,
one pass gives both (``one_pass``).
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_asvr.batch import MicroBatch, image_share
from megatron_asvr.config.schema import Config, VisionConfig
from megatron_asvr.errors import ConfigError
from megatron_asvr.model.tokenizer import VisualTokenizer
from megatron_asvr.model.vision import NUM_CHANNELS, SiglipEncoder, join_scales
from megatron_asvr.parallel.collectives import gather_images
from megatron_asvr.parallel.groups import Groups

FEATURES_VERSION = 1  # raised when the same weights and pixels give other features than before
Weight = Callable[[str], Tensor | None]  # of the model's encoder, by its name in the encoder


def one_pass(config: Config, tokenizer: VisualTokenizer, weight: Weight) -> tuple[bool, str]:
    """Whether one pass of an encoder gives a run's features and codes to the bit, and why.

    Args:
        config: the run.
        tokenizer: of its visual loss.
        weight: finds the encoder's weights in the type that they are used in; None: not there.
    """
    if (against := _against(config, tokenizer)) is None and tokenizer.encoder is not None:
        against = _other_weight(config.model.vision, tokenizer.encoder, weight)
    if against is not None:
        return False, f"no common pass for features and codes: {against}"
    return True, "one pass for features and codes: the tokenizer's encoder is the model's"


def _against(config: Config, tokenizer: VisualTokenizer) -> str | None:
    """What is known before any weight."""
    encoder, data, pp = tokenizer.encoder, config.data, config.parallel.pp
    if data.codes != data.features:
        return "codes come from the cache"
    if "vision_encoder" in config.train.trainable:
        return "the model's encoder is trained, the tokenizer's is not"
    if pp > 1 and data.codes == "online":
        return f"with parallel.pp={pp} they belong to different stages"
    if encoder is None:
        return "the tokenizer quantises pixels"
    if config.model.resolution.num_crops > 1:
        return "the model's encoder sees an image at several scales, the tokenizer at one"
    if _network(encoder.config) != _network(config.model.vision):
        return "the tokenizer's encoder differs from model.vision in size"
    return None


def _other_weight(vision: VisionConfig, encoder: SiglipEncoder, weight: Weight) -> str | None:
    """The first weight that differs, among those of the layers that both run."""
    for name, theirs in _common(vision, encoder):
        ours = weight(name)
        same = ours is not None and ours.dtype == theirs.dtype
        if not same or not torch.equal(ours, theirs.to(ours.device)):
            return f"the tokenizer's encoder has another {name}"
    return None


def _common(vision: VisionConfig, encoder: SiglipEncoder) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of the layers that both run, as the tokenizer's encoder has them."""
    number = min(encoder.config.num_feature_layers, vision.num_feature_layers)
    for name, parameter in encoder.named_parameters():
        if encoder.reads(name, number):
            yield name, parameter


def _network(vision: VisionConfig) -> VisionConfig:
    """What decides a layer's result beside its weights."""
    return dataclasses.replace(vision, num_layers=1, feature_layer=0, init_std=0.0)


class ImageReader:
    """Features and codes of micro-batches, on every rank of the group that shares the images.

    Args:
        config: the run.
        groups: process groups of the layout.
        encoder: the model's; None on a stage without one.
        tokenizer: computes codes; None where they come from the cache or are not needed.

    Attributes:
        joined: one pass gives both; set by ``join``.
    """

    def __init__(
        self,
        config: Config,
        *,
        groups: Groups,
        encoder: SiglipEncoder | None,
        tokenizer: VisualTokenizer | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.joined = False
        self._config, self._groups, self._encoder = config, groups, encoder

    def join(self, tokenizer: VisualTokenizer) -> str:
        """Let one pass give features and codes where that changes nothing; what was decided.

        Called when the encoder has its weights. Where both are needed in every step, the two
        encoders then share their memory.

        Args:
            tokenizer: of the run, also where this stage computes no codes.
        """
        own = {} if self._encoder is None else dict(self._encoder.named_parameters())
        joined, told = one_pass(self._config, tokenizer, own.get)
        if joined:
            self.share()
        return told

    def share(self) -> None:
        """What ``join`` does where one pass gives both; known by other means."""
        self.joined = True
        if self.tokenizer is not None:
            own = dict(self._encoder.named_parameters())
            for name, parameter in _common(self._config.model.vision, self.tokenizer.encoder):
                parameter.data = own[name].data

    def graph(self) -> None:
        """Let the encoders that run here be recorded as CUDA graphs."""
        for encoder in (self._encoder, self.tokenizer and self.tokenizer.encoder):
            if encoder is not None:
                encoder.graph()

    def joins(self, batch: MicroBatch) -> bool:
        """Whether ``both`` gives what the model needs of a batch."""
        return self.joined and self.tokenizer is not None and batch.codes_PD is None

    def facts(self, device: str) -> dict[str, Any]:
        """Everything beside the pixels that decides the features, by name.

        Args:
            device: type of the device that encodes.
        """
        resolution = self._config.model.resolution
        return {
            "features version": FEATURES_VERSION,
            "encoder dtype": str(self._encoder.dtype).split(".")[1],
            "matmul precision": torch.get_float32_matmul_precision(),
            "attention": f"{self._encoder.attention} on {device}",
            "scales": list(resolution.scales) if resolution.mode == "s2" else [1],
            "encoder": self._encoder.fingerprint(),
        }

    def encode(self, pixels_CHW: Tensor) -> Tensor:
        """Encoder features [I, N, F]; without a graph unless the encoder is trained.

        Args:
            pixels_CHW: normalised, all crops of each image one after another.
        """
        model, encoder = self._config.model, self._encoder
        trained = encoder.embeddings.patch_embedding.weight.requires_grad
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return join_scales(encoder(pixels_CHW), model.resolution, model.vision.grid)

    @torch.no_grad()
    def encode_both(self, pixels_ICHW: Tensor, tokenizer: VisualTokenizer) -> tuple[Tensor, Tensor]:
        """Features [I, N, F] and codes [I, N, D] from one pass of the deeper encoder.

        Args:
            pixels_ICHW: normalised.
            tokenizer: that was joined.
        """
        encoders = (self._encoder, tokenizer.encoder)
        wanted = [encoder.config.num_feature_layers for encoder in encoders]
        deeper = encoders[wanted.index(max(wanted))]
        features_INF, quantised_INF = deeper.hidden_states(pixels_ICHW, wanted)
        return features_INF, tokenizer.quantise(quantised_INF.float())

    def features(self, batch: MicroBatch) -> Tensor:
        """Encoder features [I, N, F] of all images: from the batch, or from its pixels.

        Args:
            batch: holds this rank's share of either.
        """
        own_INF = batch.features_INF
        if own_INF is None:
            own_INF = self.encode(self._pixels(batch))
        return self._gather(own_INF, batch)

    def codes(self, batch: MicroBatch) -> Tensor:
        """Target codes of every patch, int64 [P, D]: from the batch, or from the tokenizer.

        Args:
            batch: holds codes, or this rank's share of the pixels.

        Raises:
            ConfigError: there are neither codes nor a tokenizer.
        """
        if batch.codes_PD is not None:
            return batch.codes_PD
        if self.tokenizer is None:
            raise ConfigError(
                "the micro-batch brings no codes and the model has no tokenizer; fill the code "
                "cache (data.codes=cache) or set data.codes=online"
            )
        whole_ICHW = self._pixels(batch)[:: self._config.model.resolution.num_crops]
        return self._gather(self.tokenizer.encode(whole_ICHW), batch).flatten(0, 1)

    def both(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Features [P, F] and codes [P, D] of every patch, from one pass.

        Args:
            batch: holds this rank's share of the pixels.
        """
        found = self.encode_both(self._pixels(batch), self.tokenizer)
        features_PF, codes_PD = (self._gather(x, batch).flatten(0, 1) for x in found)
        return features_PF, codes_PD

    def _pixels(self, batch: MicroBatch) -> Tensor:
        """This rank's share of the images, of length 0 when there are none."""
        if batch.pixel_values_ICHW is not None:
            return batch.pixel_values_ICHW
        side = self._config.model.vision.image_size
        device = batch.document_BS.device  # tokens come to the first stage only
        return torch.empty(0, NUM_CHANNELS, side, side, device=device)

    def _gather(self, x_IN: Tensor, batch: MicroBatch) -> Tensor:
        """The rows of all images from this rank's share of them."""
        group = self._groups.tp_cp
        shares = [image_share(batch.num_images, r, group.size()) for r in range(group.size())]
        sizes = [end - start for start, end in shares]
        return gather_images(x_IN, sizes=sizes, group=group, sum_over=self._groups.cp)
