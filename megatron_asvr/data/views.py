"""How a picture becomes images for the encoder, and where their patches stand in the sequence.

Sizes are (height, width), as in transformers. A picture's *views* are the images of the encoder's
own size that are made of it: first the whole picture, then, under ``model.resolution.mode=anyres``,
the tiles of a grid, row by row. Each view has its own features and its own codes. In the sequence
the patches of the first view come first; those of all tiles follow as the rows of one large grid,
so that neighbours in the picture are neighbours in a row whatever tile they are in.

Under ``s2`` a picture has one view, of which the encoder gets several *crops*: all scales, each cut
to the encoder's size. The first one is the whole picture; codes come from it.

Everything here follows from a picture's size alone, so lengths are known before it is decoded.
Source: LLaVA-NeXT as in transformers 5.23 (``select_best_resolution``, ``get_patch_output_size``,
``pack_image_features``); the same arithmetic, rounding included, because exports must agree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

import numpy as np

from megatron_asvr.config.schema import ModelConfig, ResolutionConfig

NEWLINE = -1  # in the place of a patch: a position with the learned vector

Size = tuple[int, int]  # height and width


@dataclass(frozen=True, eq=False, slots=True)
class ImageLayout:
    """A picture's views and positions.

    Attributes:
        grid: rows and columns of tiles; None when the whole picture is its only view.
        num_views: its images for the encoder.
        patches_L: int64, which patch each of its positions holds: view * N + patch, or NEWLINE.
    """

    grid: Size | None
    num_views: int
    patches_L: np.ndarray

    @property
    def length(self) -> int:
        """Positions of the picture in a sequence."""
        return len(self.patches_L)

    def keys(self, key: str) -> list[str]:
        """Keys of the views of the picture called ``key``, which is the first view's own key."""
        if self.grid is None:
            return [key]
        rows, columns = self.grid
        return [key, *(f"{key}@{rows}x{columns}.{n}" for n in range(rows * columns))]


def picture_key(key: str) -> str:
    """The key of the picture that a view belongs to."""
    return key.rpartition("@")[0] or key


def stored_key(key: str) -> str:
    """A view's key as a code cache has it: 64 hexadecimal digits."""
    return sha256(key.encode()).hexdigest() if "@" in key else key


class ImageLayouts:
    """The layouts of pictures of every size.

    Args:
        model: encoder and resolution.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._side, self._patches = model.vision.image_size, model.vision.grid
        self._resolution = model.resolution
        plain = np.arange(model.vision.num_patches, dtype=np.int64)
        self._plain = ImageLayout(None, 1, plain)
        self._of_size = lru_cache(maxsize=4096)(self._anyres)

    @property
    def needs_sizes(self) -> bool:
        """Whether pictures of different sizes have different layouts."""
        return self._resolution.mode == "anyres"

    def of(self, size: Size) -> ImageLayout:
        """The layout of a picture of this size."""
        return self._of_size(size) if self.needs_sizes else self._plain

    def of_all(self, sizes: Sequence[Size], number: int) -> list[ImageLayout]:
        """The layouts of ``number`` pictures; their sizes only matter where they differ by them."""
        if not self.needs_sizes:
            return [self._plain] * number
        return [self._of_size(size) for _, size in zip(range(number), sizes, strict=True)]

    def _anyres(self, size: Size) -> ImageLayout:
        n = self._patches
        rows, columns = best_grid(size, self._resolution, self._side)
        number = np.arange(rows * columns * n * n, dtype=np.int64) + n * n
        large = number.reshape(rows, columns, n, n).swapaxes(1, 2).reshape(rows * n, columns * n)
        if self._resolution.unpad:
            large = large[unpadded(size, large.shape)]
        if self._resolution.newline:
            large = np.pad(large, ((0, 0), (0, 1)), constant_values=NEWLINE)
        patches_L = np.concatenate([self._plain.patches_L, large.flatten()])
        patches_L.setflags(write=False)  # shared by all pictures of this size
        return ImageLayout((rows, columns), 1 + rows * columns, patches_L)


def best_grid(size: Size, resolution: ResolutionConfig, side: int) -> Size:
    """Rows and columns of the grid that shows most of a picture, and of those wastes least.

    Args:
        size: of the picture.
        resolution: the grids to choose from.
        side: of a tile in pixels.
    """
    height, width = size
    best, most, least = resolution.grids[0], 0, math.inf
    for rows, columns in resolution.grids:
        scale = min(columns * side / width, rows * side / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        wasted = rows * side * columns * side - shown
        if shown > most or (shown == most and wasted < least):
            best, most, least = (rows, columns), shown, wasted
    return best[0], best[1]


def inside(size: Size, canvas: Size) -> Size:
    """The size of a picture that was made to fit into a canvas, its proportions kept."""
    height, width = size
    scale_x, scale_y = canvas[1] / width, canvas[0] / height
    if scale_x < scale_y:
        return min(math.ceil(height * scale_x), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * scale_y), canvas[1])


def unpadded(size: Size, patches: Size) -> tuple[slice, slice]:
    """Rows and columns of a grid of patches that show more than padding.

    Args:
        size: of the picture in the middle.
        patches: rows and columns of the grid.
    """
    (height, width), (rows, columns) = size, patches
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(padding, rows - padding), slice(None)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(None), slice(padding, columns - padding)
