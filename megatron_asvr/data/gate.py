"""Refuses an image from its bytes, before any pixel is decoded.

Decoding is where a hostile or broken file costs time and memory: a PNG of 30,000 x 30,000 zeros is
a few megabytes on disk and gigabytes decoded. Everything here reads headers and check sums only.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from typing import Literal

from PIL import Image

# No other parser of PIL is let near the bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM")
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")
MODES_16 = ("I;16", "I;16L", "I;16B", "I;16N")
TRAITS = (
    "animated",
    "alpha",
    "16bit",
    "cmyk_unmarked",
    "cmyk",
    "turned",
    "palette",
    "gray",
    "progressive",
)
MAX_ASPECT = 200  # longer side over shorter side; beyond it nothing is left after resizing
MAX_SCANS = 100  # of a progressive JPEG, each of which is a pass over all pixels; 10 are usual
JPEG_TAIL_BYTES = 4096  # cameras append padding and metadata after the end-of-image marker
ORIENTATION = 0x0112  # EXIF

Fit = Literal["square", "pad"]


@dataclass(frozen=True, slots=True)
class Look:
    """What the header of an image tells.

    Attributes:
        kind: format and what is special about it (:func:`kind_of`); empty without a header.
        width: pixels, after turning it upright.
        height: pixels, after turning it upright.
        problem: why it is refused; None when it may be decoded.
    """

    kind: str
    width: int
    height: int
    problem: str | None


def look(encoded: bytes, *, max_pixels: int, fit: Fit) -> Look:
    """What an image's header tells; no pixel is decoded.

    Args:
        encoded: the whole file.
        max_pixels: limit on the decoded size, and on the padded square where ``fit`` pads.
        fit: how the image will be brought to a square.
    """
    try:
        image = open_header(encoded)
        kind, size = _kind(image, encoded), _upright_size(image)
    except Image.DecompressionBombError as error:
        return Look("", 0, 0, f"too large: {error}")
    except Exception as error:  # a hostile header can raise anything
        why = f"{len(encoded)} bytes that begin with {encoded[:12]!r} ({type(error).__name__})"
        return Look("", 0, 0, f"not an image: {why}; formats are {', '.join(FORMATS)}")
    problem = (
        _mode_problem(image)
        or _size_problem(*image.size, max_pixels=max_pixels, fit=fit)
        or _BODY_CHECKS.get(_format(image), _no_problem)(encoded)
    )
    return Look(kind, *size, problem)


def kind_of(encoded: bytes) -> str:
    """Kind of an image whose header PIL can read: ``jpeg``, ``png_16bit``, ...

    The format, and the first of ``TRAITS`` that it has: ``alpha`` is transparency of any form,
    ``cmyk_unmarked`` lacks Adobe's marker, ``turned`` is by EXIF.
    """
    return _kind(open_header(encoded), encoded)


def open_header(encoded: bytes) -> Image.Image:
    """The image with its header read and its pixels not; raises what PIL raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's own bomb warning: max_pixels decides
        return Image.open(io.BytesIO(encoded), formats=FORMATS)


def _kind(image: Image.Image, encoded: bytes) -> str:
    name = _format(image)
    there = (
        name in ("PNG", "WEBP") and getattr(image, "is_animated", False),
        image.has_transparency_data,
        image.mode in MODES_16 or (name == "PNG" and encoded[24] == 16),
        image.mode == "CMYK" and name == "JPEG" and "adobe" not in image.info,
        image.mode == "CMYK",
        orientation(image) != 1,
        image.mode == "P",
        image.mode in ("L", "1"),
        name == "JPEG" and "progressive" in image.info,
    )
    trait = next((trait for trait, holds in zip(TRAITS, there, strict=True) if holds), None)
    return name.lower() + (f"_{trait}" if trait else "")


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) too where there is none or it cannot be read."""
    if _format(image) == "TIFF" or (_format(image) == "PNG" and "exif" not in image.info):
        return 1  # PIL turns a TIFF itself, and would decode a PNG to look behind its pixels
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata of a sound image
        return 1
    return found if found in range(1, 9) else 1


def _format(image: Image.Image) -> str:
    # A phone's several pictures in one file (MPO): the first is an ordinary JPEG.
    return "JPEG" if image.format == "MPO" else str(image.format)


def upright_size(encoded: bytes) -> tuple[int, int]:
    """Height and width of an image that :func:`look` lets through, turned upright."""
    width, height = _upright_size(open_header(encoded))
    return height, width


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if orientation(image) > 4 else (width, height)


def _mode_problem(image: Image.Image) -> str | None:
    if image.mode not in (*MODES, *MODES_16):
        return f"unknown range: pixels of mode {image.mode}; convert it to 8 bits"
    return None


def _size_problem(width: int, height: int, *, max_pixels: int, fit: Fit) -> str | None:
    longer, shorter = max(width, height), min(width, height)
    if shorter < 1 or longer > MAX_ASPECT * shorter:
        return f"too thin: {width}x{height} pixels, beyond {MAX_ASPECT} to 1"
    pixels = longer * longer if fit == "pad" else width * height
    if pixels > max_pixels:
        padded = " padded to a square" if fit == "pad" else ""
        return f"too large: {width}x{height} pixels{padded}, data.max_image_pixels={max_pixels}"
    return None


def _no_problem(encoded: bytes) -> None:
    return None


def _jpeg_problem(encoded: bytes) -> str | None:
    scans = encoded.count(b"\xff\xda")
    if scans > MAX_SCANS:
        return f"too many scans: {scans} of a JPEG; more than {MAX_SCANS} only cost time"
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
