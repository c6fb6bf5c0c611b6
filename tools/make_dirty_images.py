"""A small corpus of images as they occur in the wild, good and bad, for tests and trials.

    python tools/make_dirty_images.py FOLDER [--seed 0]

writes the files and ``meta.json``: for each its kind and whether it can be used.
"""

import argparse
import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((64, 64), (96, 301), (240, 100))  # width, height
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A smooth, slightly noisy picture with sharp edges."""

    def field(step: int, filter_: Image.Resampling) -> np.ndarray:
        size = (max(2, height // step), max(2, width // step), 3)
        small = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))
        return np.asarray(small.resize((width, height), filter_)).astype(np.int16)

    smooth = field(24, Image.Resampling.BICUBIC)
    noise = field(4, Image.Resampling.BILINEAR) - 128
    pixels = smooth + noise // 6
    pixels[height // 3 : height // 3 + max(1, height // 8)] = (20, 200, 90)
    pixels[:, width // 3 : width // 3 + max(1, width // 16)] = (240, 30, 30)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    """The image as a file of format ``kind``."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def good_images(seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of images that every decoder has to agree about."""
    rng = np.random.default_rng(seed)
    for width, height in SIZES:
        image, size = picture(rng, width, height), f"{width}x{height}"
        translucent = image.copy()
        translucent.putalpha(100)
        yield f"jpeg_420_{size}.jpg", encode(image, "JPEG", quality=90, subsampling=2)
        yield f"jpeg_444_{size}.jpg", encode(image, "JPEG", quality=92, subsampling=0)
        yield f"jpeg_progressive_{size}.jpg", encode(image, "JPEG", progressive=True)
        yield f"jpeg_gray_{size}.jpg", encode(image.convert("L"), "JPEG")
        yield f"jpeg_cmyk_{size}.jpg", encode(image.convert("CMYK"), "JPEG", quality=90)
        for turned in range(2, 9):
            exif = Image.Exif()
            exif[0x0112] = turned
            yield f"jpeg_exif{turned}_{size}.jpg", encode(image, "JPEG", quality=90, exif=exif)
        yield f"png_{size}.png", encode(image, "PNG")
        yield f"png_alpha_{size}.png", encode(translucent, "PNG")
        yield f"png_gray_{size}.png", encode(image.convert("L"), "PNG")
        yield f"webp_{size}.webp", encode(image, "WEBP", quality=85)
        yield f"bmp_{size}.bmp", encode(image, "BMP")
        yield f"tiff_{size}.tiff", encode(image, "TIFF")


def bad_images(seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of images that have to be refused."""
    rng = np.random.default_rng(seed)
    image = picture(rng, 200, 120)
    jpeg, png, webp = (encode(image, kind) for kind in ("JPEG", "PNG", "WEBP"))
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
    yield "empty.jpg", b""
    yield "garbage.jpg", rng.integers(0, 256, 5000, dtype=np.uint8).tobytes()
    yield "html.jpg", b"<html><body>404 Not Found</body></html>" * 20
    yield "header_only.jpg", jpeg[:20]
    yield "truncated.jpg", jpeg[: len(jpeg) // 2]
    yield "truncated.png", png[: len(png) // 2]
    yield "truncated.webp", webp[: len(webp) // 2]
    yield "checksum.png", png[:200] + bytes([png[200] ^ 0xFF]) + png[201:]
    yield "payload.png", damaged_payload(png)
    yield "bits16.png", encode(Image.fromarray(deep), "PNG")
    yield "animation.gif", encode(image, "GIF")
    yield "bomb.png", bomb(20_000)
    yield "lying_header.png", bomb(60_000, rows=1)
    yield "ribbon.png", encode(Image.new("RGB", (1000, 1)), "PNG")


def damaged_payload(png: bytes) -> bytes:
    """A PNG whose check sums hold but whose pixels cannot be decompressed: only decoding tells."""
    chunks = []
    for kind, body in _chunks(png):
        middle = len(body) // 2
        broken = body[:middle] + bytes(50) + body[middle + 50 :]
        chunks.append((kind, broken if kind == b"IDAT" else body))
    return PNG_SIGNATURE + b"".join(_chunk(kind, body) for kind, body in chunks)


def bomb(side: int, rows: int | None = None) -> bytes:
    """A black PNG of ``side`` x ``side`` pixels; fewer ``rows`` than the header promises."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + 3 * side)
    packed = b"".join(squeeze.compress(row) for _ in range(rows or 64)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return PNG_SIGNATURE + b"".join(
        (_chunk(b"IHDR", header), _chunk(b"IDAT", packed), _chunk(b"IEND", b""))
    )


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = len(PNG_SIGNATURE)
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        yield png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        place += 12 + length


def main() -> None:
    """Write the corpus."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    meta = []
    for usable, images in ((True, good_images(options.seed)), (False, bad_images(options.seed))):
        for name, data in images:
            (options.folder / name).write_bytes(data)
            meta.append({"name": name, "usable": usable})
    (options.folder / "meta.json").write_text(json.dumps(meta, indent=1))
    print(f"{len(meta)} images in {options.folder}")


if __name__ == "__main__":
    main()
