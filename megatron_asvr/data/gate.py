"""Refuses an image from its bytes, before any pixel is decoded.

Decoding is where a hostile or broken file costs time and memory: a PNG of 30,000 x 30,000 zeros is
a few megabytes on disk and gigabytes decoded. Everything here reads headers and check sums only.
"""

import io
import struct
import warnings
import zlib
from typing import Literal

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_ASPECT = 200  # longer side over shorter side; beyond it nothing is left after resizing
JPEG_TAIL_BYTES = 4096  # cameras append padding and metadata after the end-of-image marker

Fit = Literal["square", "pad"]


def refusal(encoded: bytes, *, max_pixels: int, fit: Fit) -> str | None:
    """Why an image is refused, or None when it may be decoded.

    Args:
        encoded: the whole file.
        max_pixels: limit on the decoded size, and on the padded square where ``fit`` pads.
        fit: how the image will be brought to a square.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's own bomb warning: the limit below decides
            image = Image.open(io.BytesIO(encoded))
    except Image.DecompressionBombError as error:
        return f"too many pixels: {error}"
    except Exception as error:  # a hostile header can raise anything
        return f"not an image ({len(encoded)} bytes): {type(error).__name__}"
    return (
        _format_problem(image)
        or _size_problem(*image.size, max_pixels=max_pixels, fit=fit)
        or _BODY_CHECKS.get(str(image.format), _no_problem)(encoded)
    )


def _format_problem(image: Image.Image) -> str | None:
    if image.format not in FORMATS:
        return f"format {image.format}; use {', '.join(FORMATS)}"
    if image.format == "PNG" and image.mode.startswith("I"):
        return "16 bits a channel: decoders disagree about it; convert it to 8 bits"
    return None


def _size_problem(width: int, height: int, *, max_pixels: int, fit: Fit) -> str | None:
    longer, shorter = max(width, height), min(width, height)
    if shorter < 1 or longer > MAX_ASPECT * shorter:
        return f"{width}x{height} pixels: more than {MAX_ASPECT} times longer than wide"
    pixels = longer * longer if fit == "pad" else width * height
    if pixels > max_pixels:
        padded = " padded to a square" if fit == "pad" else ""
        return f"{width}x{height} pixels{padded} exceed data.max_image_pixels={max_pixels}"
    return None


def _no_problem(encoded: bytes) -> None:
    return None


def _jpeg_problem(encoded: bytes) -> str | None:
    if encoded.rfind(b"\xff\xd9", max(0, len(encoded) - JPEG_TAIL_BYTES)) < 0:
        return "truncated: JPEG without end marker"
    return None


def _png_problem(encoded: bytes) -> str | None:
    place = 8
    while place + 12 <= len(encoded):
        length, kind = struct.unpack(">I4s", encoded[place : place + 8])
        end = place + 12 + length
        if end > len(encoded):
            return "truncated: PNG chunk"
        (crc,) = struct.unpack(">I", encoded[end - 4 : end])
        if zlib.crc32(memoryview(encoded)[place + 4 : end - 4]) != crc:
            return f"damaged: check sum of PNG chunk {kind.decode('latin1')}"
        if kind == b"IEND":
            return None
        place = end
    return "truncated: PNG without end chunk"


def _webp_problem(encoded: bytes) -> str | None:
    (length,) = struct.unpack("<I", encoded[4:8])
    return "truncated: WEBP" if length + 8 > len(encoded) else None


_BODY_CHECKS = {"JPEG": _jpeg_problem, "PNG": _png_problem, "WEBP": _webp_problem}
