"""Encoded images to square uint8 pixels: one DALI graph, on the CPU or on a GPU.

DALI keeps no state here: which image comes when is decided by ``data/order.py``, so that a resumed
run, or one on another number of ranks, decodes the same images in the same order. On a GPU the
decoder becomes DALI's mixed one and all later operators follow their input; nothing else differs.
"""

from collections.abc import Sequence

from megatron_asvr.platforms import select

import numpy as np
import torch
from torch import Tensor

from megatron_asvr.config.schema import ResolutionConfig
from megatron_asvr.data.augment import Window
from megatron_asvr.data.gate import Fit, upright_size
from megatron_asvr.data.pil import MEAN_COLOUR, tiles
from megatron_asvr.data.views import Size, best_grid, inside
from megatron_asvr.errors import ConfigError, DataError

try:
    import nvidia.dali.math as dali_math
    from nvidia.dali import fn, pipeline_def, types
except ImportError as error:
    raise ConfigError(
        f"images need NVIDIA DALI, which cannot be imported ({error}); "
        "pip install nvidia-dali-cuda130==2.4.0"
    ) from error

MAX_BATCH = 64  # images of one run; more are decoded in several


class ImageDecoder:
    """Decodes and resizes images.

    Args:
        image_size: side of the result in pixels.
        fit: ``pad`` puts the image on a square of the mean colour first; ``square`` stretches it.
        device: where to decode; the result stays there.
        threads: CPU threads of DALI.
        resolution: which views of an image there are (data/views.py); default: the whole of it.
        cut: only a part of each image is looked at; ask for it by ``parts``.
    """

    def __init__(
        self,
        *,
        image_size: int,
        fit: Fit,
        device: torch.device,
        threads: int,
        resolution: ResolutionConfig | None = None,
        cut: bool = False,
    ) -> None:
        self.image_size = image_size
        self.resolution = resolution or ResolutionConfig()
        self.cut = cut
        self.fit = fit
        self.device = device
        self.threads = threads
        self._pipeline = self._build()

    def views(self, encoded: Sequence[bytes]) -> list[Tensor]:
        """All views of each image, or crops of its scales, uint8 [V, C, H, W]; decoded once.

        Raises:
            DataError: an image cannot be decoded (which one, ``find_bad`` tells).
        """
        starts = range(0, len(encoded), MAX_BATCH)
        return [
            views for start in starts for views in self._run(encoded[start : start + MAX_BATCH])
        ]

    def parts(self, encoded: Sequence[bytes], windows: Sequence[Window]) -> list[Tensor]:
        """A part of each upright image, brought to a square: uint8 [C, H, W]; with ``cut``.

        Raises:
            DataError: an image cannot be decoded.
        """
        spans = (slice(s, s + MAX_BATCH) for s in range(0, len(encoded), MAX_BATCH))
        return [views[0] for s in spans for views in self._run(encoded[s], windows[s])]

    def find_bad(self, encoded: Sequence[bytes]) -> dict[int, str]:
        """Images that cannot be decoded: their index and DALI's reason.

        A batch that fails is halved until single images are left.
        """
        try:
            if encoded:
                self.views(encoded)
        except DataError as error:
            if len(encoded) == 1:
                return {0: str(error)}
            half = len(encoded) // 2
            later = self.find_bad(encoded[half:])
            return self.find_bad(encoded[:half]) | {half + i: why for i, why in later.items()}
        return {}

    def _run(self, encoded: Sequence[bytes], windows: Sequence[Window] = ()) -> list[Tensor]:
        try:
            buffers = [np.frombuffer(image, dtype=np.uint8) for image in encoded]
            self._pipeline.feed_input("encoded", buffers)
            if self.cut:
                self._pipeline.feed_input("window", [np.array(w, np.int64) for w in windows])
            if self.resolution.mode == "anyres":
                canvases = [self._canvas(image) for image in encoded]
                self._pipeline.feed_input("canvas", [np.array(c, np.int64) for c, _ in canvases])
                self._pipeline.feed_input("inside", [np.array(i, np.int64) for _, i in canvases])
            # The result is ready, and its memory is given back, in the order of torch's own work.
            whole, *more = self._pipeline.run(select()[0].stream(self.device))
        except RuntimeError as error:
            # DALI declares a pipeline invalid after an error, so the next batch gets a new one.
            self._pipeline = self._build()
            raise DataError(f"cannot be decoded: {_reason(error)}") from error
        # The copies free DALI's buffers for the next run.
        views = list(torch.from_dlpack(whole.as_tensor()).clone()[:, None])
        for canvases in more:
            views = [
                torch.cat([first, tiles(torch.from_dlpack(canvas), self.image_size)])
                for first, canvas in zip(views, canvases, strict=True)
            ]
        return views

    def _canvas(self, encoded: bytes) -> tuple[Size, Size]:
        """Sizes of the grid of tiles for an image, and of the image on it."""
        size = upright_size(encoded)
        rows, columns = best_grid(size, self.resolution, self.image_size)
        canvas = rows * self.image_size, columns * self.image_size
        return canvas, inside(size, canvas)

    def _build(self) -> object:
        on_gpu = self.device.type != "cpu"

        @pipeline_def(
            batch_size=MAX_BATCH,
            num_threads=self.threads,
            device_id=self.device.index or 0 if on_gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,  # an error then loses its own batch only
        )
        def graph() -> object:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            image = fn.decoders.image(
                encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB
            )
            shape = fn.peek_image_shape(encoded, dtype=types.INT64)
            if self.cut:
                window = fn.external_source(name="window", dtype=types.INT64, ndim=1)
                image, shape = _part(image, window), window[2:4]
            if self.fit == "pad":
                image = _pad_to_square(image, shape)
            views = [_resized(image, [self.image_size] * 2)]
            if self.resolution.mode == "anyres":
                canvas, inner = (
                    fn.external_source(name=name, dtype=types.INT64, ndim=1)
                    for name in ("canvas", "inside")
                )
                fitted = _resized(image, fn.cast(inner, dtype=types.FLOAT))
                views.append(_centred(fitted, inner, canvas, colour=0))
            if self.resolution.mode == "s2":
                sides = (self.image_size * scale for scale in self.resolution.scales[1:])
                views += [_resized(image, [side] * 2) for side in sides]
            return tuple(fn.transpose(view, perm=[2, 0, 1]) for view in views)

        pipeline = graph()
        pipeline.build()
        return pipeline


def _resized(image: object, size: object) -> object:
    """The image at a height and width."""
    return fn.resize(
        image, size=size, interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.UINT8
    )


def _part(image: object, window: object) -> object:
    """The part of the image that a window (top, left, height, width) names."""
    return fn.slice(
        image,
        window[0:2],
        window[2:4],
        axes=(0, 1),
        normalized_anchor=False,
        normalized_shape=False,
    )


def _pad_to_square(image: object, shape: object) -> object:
    """The image in the middle of a square of the mean colour.

    Args:
        image: decoded, HWC.
        shape: of the upright image; read from the header, so it is on the CPU on every device.
    """
    side = dali_math.max(shape[0], shape[1])
    return _centred(image, shape[0:2], fn.stack(side, side), colour=MEAN_COLOUR)


def _centred(image: object, size: object, canvas: object, *, colour: int) -> object:
    """The image, of this height and width, in the middle of a canvas of one colour."""
    return fn.slice(
        image,
        -((canvas - size) // 2),
        canvas,
        axes=(0, 1),
        normalized_anchor=False,
        normalized_shape=False,
        out_of_bounds_policy="pad",
        fill_values=[colour] * 3,
    )


def _reason(error: RuntimeError) -> str:
    """The line of DALI's multi-line message that says what happened."""
    _, _, after = str(error).partition("encountered:")
    lines = [line.strip() for line in (after or str(error)).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
