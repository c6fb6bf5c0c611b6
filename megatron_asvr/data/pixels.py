"""Pixels of images by their content key, normalised for the encoder."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from importlib import metadata
from typing import Any

import PIL
import torch
from torch import Tensor

from megatron_asvr.config.schema import Config
from megatron_asvr.data import locations
from megatron_asvr.data.augment import Mark, draw, parse
from megatron_asvr.data.decode import Decoder
from megatron_asvr.data.gate import look, upright_size
from megatron_asvr.data.pil import MEAN_COLOUR, PIXEL_MEAN, PIXEL_STD
from megatron_asvr.data.views import ImageLayouts, Size, picture_key
from megatron_asvr.errors import DataError

# Keys of images without a file. BLANK: every pixel is the mean colour (data.blank_images).
# ZERO: zeros after normalisation, which the official code gives a sample without an image.
BLANK_KEY = sha256(b"image of the mean colour").hexdigest()
ZERO_KEY = sha256(b"image of zeros after normalisation").hexdigest()

PIXELS_VERSION = 2  # raised when the same file and settings give other pixels than before

CACHE_BYTES = 256 * 2**20  # decoded pixels kept in memory: a small data set fits whole


_CHANGED = (
    "images of a training set are checked before: if files changed since, run `asvr data index` "
    "again where there is an index, or start again"
)


def pixel_facts(config: Config, device: str) -> dict[str, Any]:
    """Everything beside its bytes that decides an image's pixels, by name.

    Args:
        config: image settings.
        device: type of the device that decodes.
    """
    return {
        "pixels version": PIXELS_VERSION,
        "decoder": f"DALI {_dali_version()} on {device}",
        "fallback": f"Pillow {'.'.join(PIL.__version__.split('.')[:2])}",
        "model.vision.image_size": config.model.vision.image_size,
        "data.image_fit": config.data.image_fit,
        "data.pil_kinds": sorted(config.data.pil_kinds),
    }


@lru_cache(maxsize=1)
def _dali_version() -> str:
    """Major and minor version of DALI, without importing it, which takes a second."""
    names = ((dist.metadata["Name"] or "", dist.version) for dist in metadata.distributions())
    found = [version for name, version in names if name.startswith("nvidia-dali-")]
    return ".".join(found[0].split(".")[:2]) if found else "not installed"


class PixelStore:
    """Decodes images, and keeps the decoded bytes of recently used ones.

    Not thread-safe: one thread asks for everything.

    Args:
        config: image settings.
        device: where images are decoded and pixels live.
        cache_bytes: most bytes kept.
        verify: keys are hashes of the images' bytes, and an image that has changed is an error:
            its codes, found by the key, would be another image's.
    """

    def __init__(
        self,
        config: Config,
        *,
        device: torch.device,
        cache_bytes: int = CACHE_BYTES,
        verify: bool = False,
    ) -> None:
        self._verify = verify
        self._config = config
        self._device = device
        self._layouts = ImageLayouts(config.model)
        self._size = config.model.vision.image_size
        self._crops = config.model.resolution.num_crops
        self._capacity = cache_bytes // (3 * self._size**2 * self._crops)  # views
        self._kept: OrderedDict[str, Tensor] = OrderedDict()
        self._decoder = Decoder(config, device)

    def normalised(self, keys: Sequence[str], paths: dict[str, str]) -> Tensor:
        """float32 pixels in [-1, 1], [I, C, H, W]; all crops of a view, one after another.

        Args:
            keys: of views of pictures (data/views.py), in order.
            paths: a location (data/locations.py) for every picture's key that has one.

        Raises:
            DataError: a file cannot be read or decoded, or the gate refuses it.
        """
        size = self._size
        if not keys:
            return torch.empty(0, 3, size, size, device=self._device)
        marks = {key: mark for key in dict.fromkeys(keys) if (mark := parse(key)) is not None}
        new = [key for key in dict.fromkeys(keys) if key not in self._kept and key not in marks]
        pictures = (key if key in paths else picture_key(key) for key in new)
        fresh = self._decode({key: paths[key] for key in pictures if key in paths})
        changed = self._augmented(marks, paths)
        pixels_ICHW = torch.cat([self._raw(key, fresh | changed) for key in keys]).float()
        pixels_ICHW.sub_(PIXEL_MEAN).div_(PIXEL_STD)
        for place, key in enumerate(keys):
            if key == ZERO_KEY:
                pixels_ICHW[place * self._crops : (place + 1) * self._crops] = 0.0
        self._keep(fresh)
        return pixels_ICHW

    def size(self, path: str) -> Size:
        """Height and width of an image, turned upright.

        Raises:
            DataError: the file cannot be read, or the gate refuses it.
        """
        return upright_size(self._gated(path))

    def _raw(self, key: str, fresh: dict[str, Tensor]) -> Tensor:
        if key in fresh:
            return fresh[key]
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key not in (BLANK_KEY, ZERO_KEY):
            raise DataError(f"there is no picture with the view {key}; {_CHANGED}")
        shape = (self._crops, 3, self._size, self._size)
        grey = torch.full(shape, MEAN_COLOUR, dtype=torch.uint8)
        return grey.to(self._device)

    def _keep(self, fresh: dict[str, Tensor]) -> None:
        self._kept.update(fresh)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)

    def _decode(self, wanted: dict[str, str]) -> dict[str, Tensor]:
        """All views of some pictures, by their keys."""
        if not wanted:
            return {}
        paths = list(wanted.values())
        encoded = [self._read(key, path) for key, path in wanted.items()]
        try:
            decoded = self._decoder.views(encoded)
        except DataError as error:
            bad = {paths[i]: why for i, why in self._decoder.find_bad(encoded).items()}
            raise DataError(f"images cannot be used: {bad or error}; {_CHANGED}") from error
        found = {}
        for key, image, views in zip(wanted, encoded, decoded, strict=True):
            size = upright_size(image) if self._layouts.needs_sizes else (1, 1)
            # A clone each: a slice would keep its whole batch alive in the cache.
            names = self._layouts.of(size).keys(key)
            parts = views.split(self._crops)
            found.update((name, part.clone()) for name, part in zip(names, parts, strict=True))
        return found

    def _augmented(self, marks: dict[str, Mark], paths: dict[str, str]) -> dict[str, Tensor]:
        """Pictures as they are seen at one place of the order; they are not met again."""
        if not marks:
            return {}
        settings, seed = self._config.data.augment, self._config.run.seed
        drawn = [draw(settings, seed=seed, place=m.place, image=m.image) for m in marks.values()]
        names = [paths[mark.key] for mark in marks.values()]
        encoded = [self._read(m.key, path) for m, path in zip(marks.values(), names, strict=True)]
        windows = [each.window(upright_size(e)) for each, e in zip(drawn, encoded, strict=True)]
        try:
            parts = self._decoder.parts(encoded, windows)
        except DataError as error:
            bad = {names[i]: why for i, why in self._decoder.find_bad(encoded).items()}
            raise DataError(f"images cannot be used: {bad or error}; {_CHANGED}") from error
        finished = (each.finish(part)[None] for each, part in zip(drawn, parts, strict=True))
        return dict(zip(marks, finished, strict=True))

    def _read(self, key: str, path: str) -> bytes:
        """The file's bytes, after checking that they are those of the key where that is known."""
        encoded = self._gated(path)
        if self._verify and sha256(encoded).hexdigest() != key:
            raise DataError(f"image {path} is not the one that was checked; {_CHANGED}")
        return encoded

    def _gated(self, path: str) -> bytes:
        """The file's bytes, refused here too: questions come with images that no index has seen."""
        try:
            encoded = locations.read(path)
        except OSError as error:
            why = error.strerror or error
            raise DataError(f"image {path} cannot be read: {why}") from error
        data = self._config.data
        problem = look(encoded, max_pixels=data.max_image_pixels, fit=data.image_fit).problem
        if problem is not None:
            raise DataError(f"image {path} cannot be used: {problem}; {_CHANGED}")
        return encoded
