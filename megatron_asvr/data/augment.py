"""Other pictures of the same image, drawn from where its sample stands in the order.

The draw is a pure function of (seed, place of the sample in the concatenation of all steps, number
of the image in the sample): the same on any number of ranks and after a resume. The crop is taken
before resizing, so no detail is lost twice; colours and the flip are applied to the result, by the
same code for DALI and PIL. There is no rotation, erasing or mixing: text and captions would lie.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_asvr.config.schema import AugmentConfig

STREAM = 2**62  # of the counter-based generator: apart from the order's
GREY = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
_MARK = "#"


class Mark(NamedTuple):
    """An image at one place of the order: its own key, that place, its number in the sample."""

    key: str
    place: int
    image: int


Window = tuple[int, int, int, int]  # top, left, height and width in pixels


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is done to one image.

    Attributes:
        flip: mirror it.
        scale: share of its sides that is kept.
        corner: where the kept part begins, as shares of the room that there is.
        factors: of brightness, contrast and saturation.
    """

    flip: bool
    scale: float
    corner: tuple[float, float]
    factors: tuple[float, float, float]

    def window(self, size: tuple[int, int]) -> Window:
        """The part of an upright image of this height and width that is kept."""
        height, width = (max(1, round(side * self.scale)) for side in size)
        top = int(self.corner[0] * (size[0] - height + 1))
        return top, int(self.corner[1] * (size[1] - width + 1)), height, width

    def finish(self, pixels_CHW: Tensor) -> Tensor:
        """The resized image, uint8 [C, H, W], with its colours, and mirrored."""
        brightness, contrast, saturation = self.factors
        x = pixels_CHW.float() * brightness
        weights = x.new_tensor(GREY)[:, None, None]
        mean = (x * weights).sum(0).mean()
        x = mean + contrast * (x - mean)
        grey = (x * weights).sum(0)
        x = (grey + saturation * (x - grey)).round().clamp(0, 255).to(torch.uint8)
        return x.flip(2) if self.flip else x


def draw(settings: AugmentConfig, *, seed: int, place: int, image: int) -> Augmentation:
    """What is done to an image of the sample at a place of the order.

    Args:
        settings: how much may be done.
        seed: of the run.
        place: of the sample, counted through all steps.
        image: its number in the sample.
    """
    key = np.array([seed % 2**64, STREAM], dtype=np.uint64)
    counter = np.array([0, place, image, 0], dtype=np.uint64)
    u = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(7).tolist()
    brightness, contrast, saturation = (1 + settings.colour * (2 * v - 1) for v in u[4:])
    return Augmentation(
        flip=u[0] < settings.flip,
        scale=(1 - u[1] * (1 - settings.min_crop)) ** 0.5,
        corner=(u[2], u[3]),
        factors=(brightness, contrast, saturation),
    )


def marked(key: str, place: int, image: int) -> str:
    """The key of an image as it is seen at one place of the order."""
    return f"{key}{_MARK}{place}.{image}"


def parse(key: str) -> Mark | None:
    """What :func:`marked` put together; None for any other key."""
    plain, mark, where = key.partition(_MARK)
    if not mark:
        return None
    place, image = where.split(".")
    return Mark(plain, int(place), int(image))
