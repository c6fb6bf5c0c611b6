"""Images as they occur in the wild, good and bad, for tests and trials.

    python -m tools.make_dirty_images FOLDER --images 5000 --dirt 0.05 --seed 0

writes a corpus: images of every kind, among them a share of every kind of dirt, ``train.json`` in
LLaVA's format and ``meta.json`` with the kind of every file and whether it can be used.
"""

import argparse
import io
import json
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((64, 64), (96, 301), (240, 100))  # width, height
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
FLIPPED_BYTES = 40  # of a fuzzed file
ORIENTATION = 0x0112  # EXIF

Rng = np.random.Generator
Made = Callable[[Image.Image], bytes]


def picture(rng: Rng, width: int, height: int) -> Image.Image:
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


def translucent(image: Image.Image) -> Image.Image:
    """The image, more transparent from left to right."""
    ramp = np.linspace(0, 255, image.width).astype(np.uint8)
    image = image.copy()
    image.putalpha(Image.fromarray(np.tile(ramp, (image.height, 1))))
    return image


def deep_png(pixels_HWC: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel; PIL writes greys only.

    Args:
        pixels_HWC: uint16, of 1 (grey), 2 (and alpha), 3 (RGB) or 4 channels.
    """
    height, width, channels = pixels_HWC.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels_HWC.astype(">u2"))
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


def _wide(image: Image.Image, mode: str) -> np.ndarray:
    """The image at 16 bits, with lower bits that no 8-bit decoder can know."""
    pixels = np.asarray(image.convert(mode)).astype(np.uint16) * 257
    pixels = pixels.reshape(image.height, image.width, -1)
    return pixels - (pixels > 5000) * np.uint16(77)


def _turned(image: Image.Image, kind: str, turn: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    return encode(image, kind, exif=exif)


def _unmarked(jpeg: bytes) -> bytes:
    """A CMYK JPEG without Adobe's marker."""
    place = jpeg.index(b"\xff\xee")
    (length,) = struct.unpack(">H", jpeg[place + 2 : place + 4])
    return jpeg[:place] + jpeg[place + 2 + length :]


def _frames(image: Image.Image, kind: str) -> bytes:
    later = image.transpose(Image.Transpose.ROTATE_180)
    return encode(image, kind, save_all=True, append_images=[later])


def _cmyk(image: Image.Image) -> bytes:
    return encode(image.convert("CMYK"), "JPEG", quality=90)


# How each kind is made; the part of the name before the dash is what `gate.kind_of` says of it.
GOOD: dict[str, Made] = {
    "jpeg-420.jpg": lambda x: encode(x, "JPEG", quality=90, subsampling=2),
    "jpeg-444.jpg": lambda x: encode(x, "JPEG", quality=92, subsampling=0),
    "jpeg-mpo.jpg": lambda x: _frames(x, "MPO"),
    "jpeg_progressive.jpg": lambda x: encode(x, "JPEG", progressive=True),
    "jpeg_gray.jpg": lambda x: encode(x.convert("L"), "JPEG"),
    "jpeg_cmyk.jpg": _cmyk,
    "jpeg_cmyk_unmarked.jpg": lambda x: _unmarked(_cmyk(x)),
    **{
        f"jpeg_turned-{turn}.jpg": lambda x, turn=turn: _turned(x, "JPEG", turn)
        for turn in range(2, 9)
    },
    "png.png": lambda x: encode(x, "PNG"),
    "png_turned.png": lambda x: _turned(x, "PNG", 6),
    "png_gray.png": lambda x: encode(x.convert("L"), "PNG"),
    "png_gray-bits.png": lambda x: encode(x.convert("1"), "PNG"),
    "png_palette.png": lambda x: encode(x.convert("P"), "PNG"),
    "png_palette-4.png": lambda x: encode(x.quantize(7), "PNG", bits=4),
    "png_alpha.png": lambda x: encode(translucent(x), "PNG"),
    "png_alpha-gray.png": lambda x: encode(translucent(x).convert("LA"), "PNG"),
    "png_alpha-palette.png": lambda x: encode(x.quantize(7), "PNG", transparency=3),
    "png_alpha-colour.png": lambda x: encode(x, "PNG", transparency=(20, 200, 90)),
    "png_16bit-gray.png": lambda x: deep_png(_wide(x, "L")),
    "png_16bit-rgb.png": lambda x: deep_png(_wide(x, "RGB")),
    "png_alpha-16bit.png": lambda x: deep_png(_wide(translucent(x), "RGBA")),
    "png_animated.png": lambda x: _frames(x, "PNG"),
    "webp.webp": lambda x: encode(x, "WEBP", quality=85),
    "webp-lossless.webp": lambda x: encode(x, "WEBP", lossless=True),
    "webp_turned.webp": lambda x: _turned(x, "WEBP", 8),
    "webp_alpha.webp": lambda x: encode(translucent(x), "WEBP"),
    "webp_animated.webp": lambda x: _frames(x, "WEBP"),
    "bmp.bmp": lambda x: encode(x, "BMP"),
    "bmp_palette.bmp": lambda x: encode(x.convert("P"), "BMP"),
    "tiff.tiff": lambda x: encode(x, "TIFF"),
    "tiff-lzw.tiff": lambda x: encode(x, "TIFF", compression="tiff_lzw"),
    "tiff-turned.tiff": lambda x: _turned(x, "TIFF", 6),
    "tiff_gray.tiff": lambda x: encode(x.convert("L"), "TIFF"),
    "tiff_cmyk.tiff": lambda x: encode(x.convert("CMYK"), "TIFF"),
    "tiff_16bit.tiff": lambda x: encode(Image.fromarray(_wide(x, "L")[..., 0]), "TIFF"),
    "tiff_alpha.tiff": lambda x: encode(translucent(x), "TIFF"),
    "gif_palette.gif": lambda x: encode(x, "GIF"),
    "gif_palette-frames.gif": lambda x: _frames(x, "GIF"),
    "gif_alpha.gif": lambda x: encode(x.quantize(7), "GIF", transparency=3),
    "avif.avif": lambda x: encode(x, "AVIF"),
    "avif_alpha.avif": lambda x: encode(translucent(x), "AVIF"),
    "ppm.ppm": lambda x: encode(x, "PPM"),
}

Broken = Callable[[Image.Image, Rng], bytes]


def _half(kind: str, **options: object) -> Broken:
    def cut(image: Image.Image, rng: Rng) -> bytes:
        whole = encode(image, kind, **options)
        return whole[: len(whole) // 2]

    return cut


def _damaged_check_sum(image: Image.Image, rng: Rng) -> bytes:
    whole = bytearray(encode(image, "PNG"))
    whole[200] ^= 0xFF
    return bytes(whole)


def _many_scans(image: Image.Image, rng: Rng) -> bytes:
    """A progressive JPEG whose last scan comes 2,000 times: a pass over all pixels for each."""
    whole = encode(image, "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * 2000 + whole[-2:]


def _floats(image: Image.Image, rng: Rng) -> bytes:
    return encode(image.convert("F"), "TIFF")


# Bytes that have to be refused, whatever the picture.
BAD: dict[str, Broken] = {
    "empty.jpg": lambda x, rng: b"",
    "garbage.jpg": lambda x, rng: rng.integers(0, 256, 5000, dtype=np.uint8).tobytes(),
    "html.jpg": lambda x, rng: b"<html><body>404 Not Found</body></html>" * 20,
    "header_only.jpg": lambda x, rng: encode(x, "JPEG")[:20],
    "truncated.jpg": _half("JPEG"),
    "truncated_progressive.jpg": _half("JPEG", progressive=True),
    "truncated.png": _half("PNG"),
    "truncated.webp": _half("WEBP"),
    "truncated.gif": _half("GIF"),
    "truncated.tiff": _half("TIFF"),
    "truncated.bmp": _half("BMP"),
    "truncated.avif": _half("AVIF"),
    "checksum.png": _damaged_check_sum,
    "payload.png": lambda x, rng: damaged_payload(encode(x, "PNG")),
    "floats.tiff": _floats,
    "bomb.png": lambda x, rng: bomb(20_000),
    "lying_header.png": lambda x, rng: bomb(60_000, rows=1),
    "lying_small.png": lambda x, rng: bomb(200, rows=1),
    "scans.jpg": _many_scans,
    "ribbon.png": lambda x, rng: encode(Image.new("RGB", (1000, 1)), "PNG"),
}


def fuzzed(data: bytes, rng: Rng) -> bytes:
    """The file with some bytes of random values; whether it can still be used is not known."""
    out = bytearray(data)
    for place in rng.integers(0, len(out), min(FLIPPED_BYTES, len(out) // 8 + 1)):
        out[place] = rng.integers(0, 256)
    return bytes(out)


def good_images(seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of images that have to be decoded as the reference does."""
    rng = np.random.default_rng(seed)
    for width, height in SIZES:
        image = picture(rng, width, height)
        for name, make in GOOD.items():
            stem, _, ending = name.rpartition(".")
            yield f"{stem}-{width}x{height}.{ending}", make(image)


def bad_images(seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of images that have to be refused."""
    rng = np.random.default_rng(seed)
    image = picture(rng, 200, 120)
    for name, make in BAD.items():
        yield name, make(image, rng)


def corpus(images: int, dirt: float, seed: int) -> Iterator[tuple[str, str, bool | None, bytes]]:
    """Name, kind, whether it can be used (None: not known) and bytes of every image of a corpus.

    Args:
        images: how many.
        dirt: share of bad or fuzzed ones; every kind of them comes equally often.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    num_dirty = round(images * dirt)
    places = {int(p): n for n, p in enumerate(rng.permutation(images)[:num_dirty])}
    good, bad = list(GOOD), [*BAD, *(f"fuzzed_{name}" for name in GOOD)]
    common = 12  # of good images two in three are one of the first kinds (JPEG)
    for number in range(images):
        image = picture(rng, *(int(side) for side in rng.integers(60, 500, 2)))
        if number in places:
            kind = bad[places[number] % len(bad)]
            if kind in BAD:
                data, usable = BAD[kind](image, rng), False
            else:
                data, usable = fuzzed(GOOD[kind.removeprefix("fuzzed_")](image), rng), None
        else:
            kind = good[int(rng.integers(common if rng.random() < 2 / 3 else len(good)))]
            data, usable = GOOD[kind](image), True
        yield f"{number:06d}_{kind}", kind.rpartition(".")[0], usable, data


def damaged_payload(whole: bytes) -> bytes:
    """A PNG whose check sums hold but whose pixels cannot be decompressed: only decoding tells."""
    chunks = []
    for kind, body in _chunks(whole):
        middle = len(body) // 2
        broken = body[:middle] + bytes(50) + body[middle + 50 :]
        chunks.append((kind, broken if kind == b"IDAT" else body))
    return png(*chunks)


def bomb(side: int, rows: int | None = None) -> bytes:
    """A black PNG of ``side`` x ``side`` pixels; fewer ``rows`` than the header promises."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + 3 * side)
    packed = b"".join(squeeze.compress(row) for _ in range(rows or 64)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return png((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of these chunks, with their check sums."""
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    return PNG_SIGNATURE + b"".join(parts)


def _chunks(whole: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = len(PNG_SIGNATURE)
    while place < len(whole):
        (length,) = struct.unpack(">I", whole[place : place + 4])
        yield whole[place + 4 : place + 8], whole[place + 8 : place + 8 + length]
        place += 12 + length


def write_corpus(folder: Path, *, images: int, dirt: float, seed: int) -> list[dict[str, object]]:
    """Write a corpus; what its ``meta.json`` says."""
    folder.mkdir(parents=True, exist_ok=True)
    meta, records = [], []
    for name, kind, usable, data in corpus(images, dirt, seed):
        (folder / name).write_bytes(data)
        meta.append({"name": name, "kind": kind, "usable": usable})
        talk = [
            {"from": "human", "value": "<image>\nWhat kind of file is this?"},
            {"from": "gpt", "value": kind},
        ]
        records.append({"id": name, "image": name, "conversations": talk})
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    (folder / "train.json").write_text(json.dumps(records))
    return meta


def main() -> None:
    """Write a corpus."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--dirt", type=float, default=0.05, help="share of bad and fuzzed images")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    meta = write_corpus(options.folder, images=options.images, dirt=options.dirt, seed=options.seed)
    counts = Counter(str(each["usable"]) for each in meta)
    print(
        f"{len(meta)} images in {options.folder}: {counts['True']} good, {counts['False']} bad, "
        f"{counts['None']} fuzzed"
    )


if __name__ == "__main__":
    main()
