"""Encoded images to square uint8 pixels: one DALI graph, on the CPU or on a GPU.

DALI keeps no state here: which image comes when is decided by ``data/order.py``, so that a resumed
run, or one on another number of ranks, decodes the same images in the same order. On a GPU the
decoder becomes DALI's mixed one and all later operators follow their input; nothing else differs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_asvr.data.gate import Fit
from megatron_asvr.data.pil import MEAN_COLOUR
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
    """

    def __init__(self, *, image_size: int, fit: Fit, device: torch.device, threads: int) -> None:
        self.image_size = image_size
        self.fit = fit
        self.device = device
        self.threads = threads
        self._pipeline = self._build()

    def decode(self, encoded: Sequence[bytes]) -> Tensor:
        """Pixels of the images, uint8 [I, C, H, W].

        Raises:
            DataError: an image cannot be decoded (which one, ``find_bad`` tells).
        """
        starts = range(0, len(encoded), MAX_BATCH)
        return torch.cat([self._run(encoded[start : start + MAX_BATCH]) for start in starts])

    def find_bad(self, encoded: Sequence[bytes]) -> dict[int, str]:
        """Images that cannot be decoded: their index and DALI's reason.

        A batch that fails is halved until single images are left.
        """
        try:
            if encoded:
                self.decode(encoded)
        except DataError as error:
            if len(encoded) == 1:
                return {0: str(error)}
            half = len(encoded) // 2
            later = self.find_bad(encoded[half:])
            return self.find_bad(encoded[:half]) | {half + i: why for i, why in later.items()}
        return {}

    def _run(self, encoded: Sequence[bytes]) -> Tensor:
        try:
            buffers = [np.frombuffer(image, dtype=np.uint8) for image in encoded]
            self._pipeline.feed_input("encoded", buffers)
            (pixels,) = self._pipeline.run()
        except RuntimeError as error:
            # DALI declares a pipeline invalid after an error, so the next batch gets a new one.
            self._pipeline = self._build()
            raise DataError(f"cannot be decoded: {_reason(error)}") from error
        # The copy frees DALI's buffer for the next run.
        return torch.from_dlpack(pixels.as_tensor()).clone()

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
            if self.fit == "pad":
                image = _pad_to_square(image, fn.peek_image_shape(encoded, dtype=types.INT64))
            image = fn.resize(
                image,
                resize_x=self.image_size,
                resize_y=self.image_size,
                interp_type=types.INTERP_CUBIC,
                antialias=True,
                dtype=types.UINT8,
            )
            return fn.transpose(image, perm=[2, 0, 1])

        pipeline = graph()
        pipeline.build()
        return pipeline


def _pad_to_square(image: object, shape: object) -> object:
    """The image in the middle of a square of the mean colour.

    Args:
        image: decoded, HWC.
        shape: of the upright image; read from the header, so it is on the CPU on every device.
    """
    height, width = shape[0], shape[1]
    side = dali_math.max(height, width)
    return fn.slice(
        image,
        fn.stack(-((side - height) // 2), -((side - width) // 2)),
        fn.stack(side, side),
        axes=(0, 1),
        normalized_anchor=False,
        normalized_shape=False,
        out_of_bounds_policy="pad",
        fill_values=[MEAN_COLOUR] * 3,
    )


def _reason(error: RuntimeError) -> str:
    """The line of DALI's multi-line message that says what happened."""
    _, _, after = str(error).partition("encountered:")
    lines = [line.strip() for line in (after or str(error)).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
