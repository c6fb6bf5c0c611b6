"""The reference of the image path in PIL and numpy; DALI's graph is tested against it.

Some kinds of images take it in earnest (``data/decode.py``): those that DALI cannot read, or reads
otherwise. The rules are: EXIF turns the image upright; transparency lies on white, as a viewer
shows it; 16 bits a channel keep their upper 8, as PIL does with 16-bit colour; of several pictures
in a file the first counts; colour profiles are left alone.
"""

from typing import Any

import numpy as np
from PIL import Image

from megatron_asvr.config.schema import ResolutionConfig
from megatron_asvr.data.gate import MODES_16, Fit, open_header, orientation
from megatron_asvr.data.views import best_grid, inside

MEAN_COLOUR = 127  # LLaVA pads with int(255 * 0.5)
PIXEL_MEAN = PIXEL_STD = 127.5  # SigLIP: [0, 255] to [-1, 1]
WHITE = (255, 255, 255, 255)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(encoded: bytes, *, image_size: int, fit: Fit) -> np.ndarray:
    """The image as uint8 [C, H, W], turned upright and square.

    Args:
        encoded: the whole file.
        image_size: side of the result in pixels.
        fit: ``pad`` puts the image on a square of the mean colour first; ``square`` stretches it.

    Source: LLaVA's expand2square; SigLIP's bicubic resize.
    """
    image = upright(encoded)
    return channels_first(_square(image, image_size, fit))


def decode_views(
    encoded: bytes,
    *,
    image_size: int,
    fit: Fit,
    resolution: ResolutionConfig,
    window: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """All views of an image, or the crops of its scales: uint8 [V, C, H, W]; see data/views.py.

    Args:
        encoded: the whole file.
        image_size: side of a view in pixels.
        fit: of the first view; see :func:`decode`.
        resolution: which views there are.
        window: only this part of the upright image: top, left, height and width in pixels.
    """
    image = upright(encoded)
    if window is not None:
        top, left, height, width = window
        image = image.crop((left, top, left + width, top + height))
    whole = channels_first(_square(image, image_size, fit))[None]
    if resolution.mode == "single":
        return whole
    if resolution.mode == "s2":
        squares = (_square(image, image_size * scale, fit) for scale in resolution.scales)
        return np.concatenate([tiles(channels_first(x), image_size) for x in squares])
    size = image.size[1], image.size[0]
    rows, columns = best_grid(size, resolution, image_size)
    height, width = rows * image_size, columns * image_size
    inner = inside(size, (height, width))
    canvas = Image.new("RGB", (width, height))
    resized = image.resize((inner[1], inner[0]), Image.Resampling.BICUBIC)
    canvas.paste(resized, ((width - inner[1]) // 2, (height - inner[0]) // 2))
    return np.concatenate([whole, tiles(channels_first(canvas), image_size)])


def tiles(canvas: Any, side: int) -> Any:
    """The tiles [V, C, H, W] of a canvas [C, rows * H, columns * W], row by row.

    Args:
        canvas: array or tensor.
        side: of a tile; the canvas is made of whole ones.
    """
    rows, columns = canvas.shape[1] // side, canvas.shape[2] // side
    cut = canvas.reshape(3, rows, side, columns, side)
    return cut.swapaxes(2, 3).swapaxes(0, 1).swapaxes(1, 2).reshape(-1, 3, side, side)


def channels_first(image: Image.Image) -> np.ndarray:
    """A picture as uint8 [C, H, W]."""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _square(image: Image.Image, side: int, fit: Fit) -> Image.Image:
    width, height = image.size
    if fit == "pad" and width != height:
        longer = max(width, height)
        square = Image.new("RGB", (longer, longer), (MEAN_COLOUR,) * 3)
        square.paste(image, ((longer - width) // 2, (longer - height) // 2))
        image = square
    return image.resize((side, side), Image.Resampling.BICUBIC)


def upright(encoded: bytes) -> Image.Image:
    """The whole image in RGB, turned upright; raises what PIL raises, also where bytes are missing.

    Args:
        encoded: the whole file.
    """
    return as_rgb(open_header(encoded))


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture in RGB, turned upright, transparency on white; raises what PIL raises.

    Args:
        image: as PIL opened it, in any mode.
    """
    image.load()
    turn = _TURNS.get(orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode in MODES_16:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)
    image = image.convert("RGB")
    image.info = {}  # whoever reads the orientation again would turn it again
    return image


def problem(encoded: bytes) -> str | None:
    """Why PIL cannot decode the image completely, or None."""
    try:
        upright(encoded)
    except Exception as error:  # a damaged file can raise anything
        return f"cannot be decoded: PIL: {type(error).__name__}: {error}"
    return None


def normalise(pixels: np.ndarray) -> np.ndarray:
    """``pixels`` as float32 in [-1, 1]."""
    return (pixels.astype(np.float32) - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
