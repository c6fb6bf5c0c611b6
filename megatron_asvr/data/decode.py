"""Encoded images to square pixels: by DALI, or by PIL where DALI cannot or may not.

DALI reads no GIF and AVIF, drops transparency instead of compositing it, takes CMYK without Adobe's
marker for the inverse of what PIL does, and reads fewer forms of TIFF. Such images are decoded by
the reference (``data/pil.py``), and so are the kinds of ``data.pil_kinds``. An image's kind is a
function of its bytes, so every rank and every run takes the same way.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_asvr.config.schema import Config, ResolutionConfig
from megatron_asvr.data import pil
from megatron_asvr.data.augment import Window
from megatron_asvr.data.gate import FORMATS, TRAITS, kind_of
from megatron_asvr.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron_asvr.data.dali.pipeline import ImageDecoder

PIL_FORMATS = ("tiff", "gif", "avif", "ppm")
PIL_TRAITS = ("animated", "alpha", "cmyk_unmarked")


def takes_pil(kind: str, more: Collection[str] = ()) -> bool:
    """Whether images of a kind are decoded by PIL.

    Args:
        kind: as in ``gate.kind_of``.
        more: kinds beside those that always are (``data.pil_kinds``).
    """
    name, _, trait = kind.partition("_")
    return name in PIL_FORMATS or trait in PIL_TRAITS or kind in more


class Decoder:
    """Decodes and resizes images.

    Args:
        config: image settings.
        device: where to decode; the result stays there.
        whole_only: one view of each image, whatever ``model.resolution`` says.

    Raises:
        ConfigError: ``data.pil_kinds`` names a kind that does not exist.
    """

    def __init__(self, config: Config, device: torch.device, *, whole_only: bool = False) -> None:
        self._resolution = ResolutionConfig() if whole_only else config.model.resolution
        self._config = config
        self._device = device
        self._more = config.data.pil_kinds
        self._dali: ImageDecoder | None = None
        self._cutter: ImageDecoder | None = None
        for kind in self._more:
            name, _, trait = kind.partition("_")
            if name.upper() not in FORMATS or trait not in ("", *TRAITS):
                raise ConfigError(
                    f"data.pil_kinds names {kind!r}; kinds are one of "
                    f"{', '.join(FORMATS).lower()}, alone or with _ and one of {', '.join(TRAITS)}"
                )

    @property
    def dali(self) -> "ImageDecoder":
        """DALI's part alone; importing DALI takes a second, so only here."""
        if self._dali is None:
            self._dali = self._make_dali()
        return self._dali

    def _make_dali(self, *, cut: bool = False) -> "ImageDecoder":
        from megatron_asvr.data.dali.pipeline import ImageDecoder

        return ImageDecoder(
            image_size=self._config.model.vision.image_size,
            fit=self._config.data.image_fit,
            device=self._device,
            threads=self._config.data.decode_threads,
            resolution=self._resolution,
            cut=cut,
        )

    def views(self, encoded: Sequence[bytes]) -> list[Tensor]:
        """All views of each image, or crops of its scales (data/views.py), uint8 [V, C, H, W].

        Raises:
            DataError: an image cannot be decoded (which one, ``find_bad`` tells).
        """
        mine = [self._takes_pil(image) for image in encoded]
        theirs = [image for image, pil_way in zip(encoded, mine, strict=True) if not pil_way]
        decoded = iter(self.dali.views(theirs) if theirs else ())
        return [
            self._by_pil(image) if pil_way else next(decoded)
            for image, pil_way in zip(encoded, mine, strict=True)
        ]

    def parts(self, encoded: Sequence[bytes], windows: Sequence[Window]) -> list[Tensor]:
        """A part of each upright image, brought to a square: uint8 [C, H, W].

        Args:
            encoded: the files.
            windows: which part of each (``augment.Window``).

        Raises:
            DataError: an image cannot be decoded (which one, ``find_bad`` tells).
        """
        pairs = list(zip(encoded, windows, strict=True))
        mine = [self._takes_pil(image) for image in encoded]
        theirs = [pair for pair, pil_way in zip(pairs, mine, strict=True) if not pil_way]
        if theirs and self._cutter is None:
            self._cutter = self._make_dali(cut=True)
        decoded = iter(self._cutter.parts(*zip(*theirs, strict=True)) if theirs else ())
        return [
            self._by_pil(*pair)[0] if pil_way else next(decoded)
            for pair, pil_way in zip(pairs, mine, strict=True)
        ]

    def find_bad(self, encoded: Sequence[bytes]) -> dict[int, str]:
        """Images that cannot be decoded completely: their index and the reason.

        PIL decodes all of them, which is stricter than DALI alone; DALI those that it will.
        """
        bad = {i: why for i, image in enumerate(encoded) if (why := pil.problem(image))}
        theirs = [
            i for i, image in enumerate(encoded) if i not in bad and not self._takes_pil(image)
        ]
        found = self.dali.find_bad([encoded[i] for i in theirs]) if theirs else {}
        return dict(sorted((bad | {theirs[i]: why for i, why in found.items()}).items()))

    def _takes_pil(self, encoded: bytes) -> bool:
        try:
            return takes_pil(kind_of(encoded), self._more)
        except Exception:  # no header: whoever gets it refuses it
            return True

    def _by_pil(self, encoded: bytes, window: Window | None = None) -> Tensor:
        size, fit = self._config.model.vision.image_size, self._config.data.image_fit
        try:
            pixels = pil.decode_views(
                encoded, image_size=size, fit=fit, resolution=self._resolution, window=window
            )
        except Exception as error:  # a damaged file can raise anything
            raise DataError(f"cannot be decoded: PIL: {type(error).__name__}: {error}") from error
        return torch.from_numpy(pixels).to(self._device)
