"""The reference of the image path in PIL and numpy; DALI's graph is tested against it."""

import io

import numpy as np
from PIL import Image, ImageOps

from megatron_asvr.data.gate import Fit

MEAN_COLOUR = 127  # LLaVA pads with int(255 * 0.5)
PIXEL_MEAN = PIXEL_STD = 127.5  # SigLIP: [0, 255] to [-1, 1]


def decode(encoded: bytes, *, image_size: int, fit: Fit) -> np.ndarray:
    """The image as uint8 [C, H, W], turned upright and square.

    Args:
        encoded: the whole file.
        image_size: side of the result in pixels.
        fit: ``pad`` puts the image on a square of the mean colour first; ``square`` stretches it.

    Source: LLaVA's expand2square; SigLIP's bicubic resize.
    """
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB")
    width, height = image.size
    if fit == "pad" and width != height:
        side = max(width, height)
        square = Image.new("RGB", (side, side), (MEAN_COLOUR,) * 3)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    resized = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def normalise(pixels: np.ndarray) -> np.ndarray:
    """``pixels`` as float32 in [-1, 1]."""
    return (pixels.astype(np.float32) - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
