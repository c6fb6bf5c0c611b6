"""Bad images are found before decoding or by it; good ones agree with the PIL reference."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_asvr.data import images as images_module
from megatron_asvr.data import pil
from megatron_asvr.data.decode import Decoder, takes_pil
from megatron_asvr.data.gate import look
from megatron_asvr.data.images import ImageIndex
from megatron_asvr.data.pixels import BLANK_KEY, ZERO_KEY, PixelStore
from megatron_asvr.errors import ConfigError, DataError
from tests.unit.data_corpus import config, first_views
from tools.make_dirty_images import (
    bad_images,
    damaged_payload,
    deep_png,
    encode,
    fuzzed,
    good_images,
    picture,
)

CPU = torch.device("cpu")
GOOD, BAD = dict(good_images()), dict(bad_images())
ONLY_DECODING_TELLS = {
    "payload.png",
    "truncated.gif",
    "truncated.tiff",
    "truncated.bmp",
    "lying_small.png",
}


def refusal(data, *, max_pixels=10**6, fit="square"):
    return look(data, max_pixels=max_pixels, fit=fit).problem


@pytest.fixture(scope="module")
def decoder():
    return Decoder(config(), CPU)


@pytest.mark.parametrize("fit", ["square", "pad"])
def test_gate_passes_good_images_and_refuses_bad_ones(fit):
    for name, data in GOOD.items():
        assert refusal(data, fit=fit) is None, name
    for name, data in BAD.items():
        refused = refusal(data, fit=fit) is not None
        assert refused != (name in ONLY_DECODING_TELLS), name


def test_reasons_begin_with_what_is_counted_and_end_with_what_is_there():
    """The report counts what stands before the colon; numbers of one file come behind it."""
    refused = {name: refusal(data) for name, data in BAD.items()}
    reasons = {name: why.split(":")[0] for name, why in refused.items() if why is not None}
    assert set(reasons.values()) == {
        "damaged",
        "not an image",
        "too large",
        "too many scans",
        "too thin",
        "truncated",
        "unknown range",
    }
    assert reasons["html.jpg"] == "not an image"
    assert "780 bytes that begin with b'<html><body>'" in refused["html.jpg"]


def test_kind_and_upright_size_are_known_from_the_header():
    for name, data in GOOD.items():
        kind, *_, size = name.rpartition(".")[0].split("-")
        width, height = map(int, size.split("x"))
        if (
            kind.endswith("turned") and name.split("-")[1] not in ("2", "3", "4")
        ) or name.startswith("tiff-turned"):
            width, height = height, width
        seen = look(data, max_pixels=10**6, fit="square")
        assert (seen.kind, seen.width, seen.height) == (kind, width, height), name


def test_pixel_limit_counts_the_padded_square():
    data = encode(picture(np.random.default_rng(0), 200, 50), "PNG")
    assert refusal(data, max_pixels=10_000) is None
    assert "200x50 pixels padded to a square" in refusal(data, max_pixels=10_000, fit="pad")
    assert refusal(data, max_pixels=40_000, fit="pad") is None


def test_bombs_cost_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("bomb.png", "lying_header.png"):
            assert "pixels" in refusal(BAD[name], max_pixels=50_000_000)


@pytest.mark.parametrize("fit", ["square", "pad"])
@pytest.mark.parametrize("size", [48, 224])
def test_dali_agrees_with_pil(fit, size):
    """Decoding is bit-exact; the two bicubic filters differ in rounding only."""
    decoder = Decoder(config(model__vision__image_size=size, data__image_fit=fit), CPU)
    ours = first_views(decoder, list(GOOD.values())).numpy().astype(int)
    for name, got in zip(GOOD, ours, strict=True):
        want = pil.decode(GOOD[name], image_size=size, fit=fit).astype(int)
        difference = np.abs(got - want)
        if takes_pil(name.partition("-")[0].partition(".")[0]):
            assert difference.max() == 0, name
        # Measured over 3 seeds of this corpus; without antialiasing the mean is over 0.5. Two
        # colours, dithered, are all edges; of 16 bits DALI rounds where PIL cuts.
        bounds = {"bits-": (32, 2.2), "palette": (19, 0.26), "16bit": (11, 0.6)}
        worst, mean = next((b for part, b in bounds.items() if part in name), (11, 0.2))
        assert difference.max() <= 1.3 * worst, name
        assert difference.mean() <= 1.3 * mean, name


def test_pil_takes_what_dali_reads_otherwise():
    """Every kind that is kept from DALI has its reason."""
    dali = Decoder(config(), CPU).dali
    for name, data in GOOD.items():
        kind = name.partition("-")[0].partition(".")[0]
        if kind.endswith(("alpha", "cmyk_unmarked")):
            want = pil.decode(data, image_size=16, fit="square").astype(int)
            got = 0 if kind.startswith(("gif", "avif")) else first_views(dali, [data])[0].numpy()
            assert takes_pil(kind)
            assert np.abs(got - want).max() > 16, name


def test_pil_kinds_are_decoded_exactly_and_have_to_exist():
    data = [data for name, data in GOOD.items() if name.startswith("jpeg_cmyk-")]
    exact = first_views(Decoder(config(data__pil_kinds=["jpeg_cmyk"]), CPU), data)
    want = [pil.decode(each, image_size=16, fit="square") for each in data]
    assert np.array_equal(exact, want)
    assert not np.array_equal(first_views(Decoder(config(), CPU), data), want)
    for wrong in ("jpg", "png_deep"):
        with pytest.raises(ConfigError, match=rf"data\.pil_kinds names '{wrong}'.*cmyk_unmarked"):
            Decoder(config(data__pil_kinds=[wrong]), CPU)


def test_16_bits_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8, 1)
    for channels in (1, 3):
        got = np.asarray(pil.upright(deep_png(ramp.repeat(channels, axis=2))))
        assert np.abs(got.astype(int) - ramp / 257).max() <= 1
        assert got.min() == 0
        assert got.max() == 255


def test_transparency_lies_on_white():
    colour, alpha = np.array([200, 10, 60]), 64
    pixels = np.tile(np.array([*colour, alpha], dtype=np.uint8), (8, 8, 1))
    want = colour * alpha / 255 + 255 * (1 - alpha / 255)
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        got = pil.decode(encode(Image.fromarray(pixels), kind, **options), image_size=4, fit="pad")
        assert np.abs(got - want[:, None, None]).max() <= 1, kind


def test_turned_images_stand_upright():
    image = picture(np.random.default_rng(2), 60, 40)
    stored = image.transpose(Image.Transpose.ROTATE_90)  # EXIF 6: turn it back
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode(stored, kind, exif=exif, **options)
        assert np.array_equal(pil.upright(data), image), kind


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_images_never_crash_and_what_passes_is_decoded(seed, decoder):
    rng = np.random.default_rng(seed)
    some = {name: fuzzed(data, rng) for name, data in GOOD.items() if "64x64" in name}
    passed = [data for data in some.values() if refusal(data) is None]
    bad = decoder.find_bad(passed)
    good = [data for number, data in enumerate(passed) if number not in bad]
    assert len(good) < len(some)
    assert len(first_views(decoder, good)) == len(good)
    for data in good:
        Image.open(io.BytesIO(data)).load()


def test_same_size_image_is_bit_exact(decoder):
    data = encode(picture(np.random.default_rng(1), 16, 16), "PNG")
    np.testing.assert_array_equal(
        first_views(decoder, [data])[0].numpy(), pil.decode(data, image_size=16, fit="square")
    )


def test_result_does_not_depend_on_the_batch(decoder):
    data = list(GOOD.values())
    many = first_views(decoder, data * 2)
    assert len(many) == 2 * len(data) > 64
    for place in (0, 7, len(data) + 3):
        alone = first_views(decoder, [data[place % len(data)]])[0]
        assert torch.equal(many[place], alone)


def test_bad_images_of_a_batch_are_found_and_the_decoder_goes_on(decoder):
    good = list(GOOD.values())
    batch = [*good[:5], BAD["payload.png"], *good[5:9], b"junk" * 9]
    bad = decoder.find_bad(batch)
    assert sorted(bad) == [5, 10]
    assert all("cannot be decoded" in why for why in bad.values())
    assert decoder.find_bad([]) == decoder.find_bad(batch[:5]) == {}


def test_store_normalises_and_keeps_recent_images(tmp_path):
    paths = {}
    for number, data in enumerate(list(GOOD.values())[:4]):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(data)
        paths[str(number)] = str(path)
    store = PixelStore(config(), device=CPU, cache_bytes=2 * 3 * 16 * 16)
    keys = ["0", BLANK_KEY, "1", "0", ZERO_KEY]
    pixels = store.normalised(keys, paths)
    assert pixels.shape == (5, 3, 16, 16)
    assert pixels.dtype == torch.float32
    for place, key in ((0, "0"), (2, "1"), (3, "0")):
        decoded = first_views(store._decoder, [Path(paths[key]).read_bytes()])[0]
        assert torch.equal(pixels[place], torch.from_numpy(pil.normalise(decoded.numpy())))
    assert (pixels[1] == np.float32((127 - 127.5) / 127.5)).all()
    assert (pixels[4] == 0).all()
    Path(paths["0"]).unlink()
    assert torch.equal(store.normalised(["0"], paths), pixels[:1])  # still in memory
    store.normalised(["2", "3"], paths)
    with pytest.raises(DataError, match=r"0\.jpg cannot be read"):
        store.normalised(["0"], paths)
    Path(paths["1"]).write_bytes(damaged_payload(BAD["payload.png"]))
    with pytest.raises(DataError, match=r"1\.jpg.*cannot be decoded"):
        store.normalised(["1"], paths)


@pytest.fixture
def folder(tmp_path):
    for name, data in [*list(GOOD.items())[:6], *BAD.items()]:
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_index_finds_every_bad_image(folder):
    index = ImageIndex(config(), folder=folder / "cache", device=CPU)
    paths = [str(p) for p in folder.glob("*.*")] + [str(folder / "absent.png")]
    index.prepare(paths)
    bad = {Path(path).name: why for path, why in index.problems(paths).items()}
    assert sorted(bad) == sorted([*BAD, "absent.png"])
    assert bad["absent.png"] == "missing file"
    assert "cannot be decoded" in bad["payload.png"]
    assert len({index.entries[p].key for p in paths if Path(p).name in GOOD}) == 6


def test_index_is_kept_and_only_changed_files_are_read_again(folder, monkeypatch):
    paths = sorted(str(p) for p in folder.glob("*.*"))
    first = ImageIndex(config(), folder=folder / "cache", device=CPU)
    first.prepare(paths)
    read = []

    def noting(encoded, **limits):
        read.append(encoded)
        return look(encoded, **limits)

    monkeypatch.setattr(images_module, "look", noting)
    again = ImageIndex(config(), folder=folder / "cache", device=CPU)
    again.prepare(paths)
    assert not read
    assert again.entries == first.entries
    (good, data), *_ = GOOD.items()
    larger, touched = folder / "empty.jpg", folder / good
    larger.write_bytes(data)
    os.utime(touched, ns=(1, 1))
    third = ImageIndex(config(), folder=folder / "cache", device=CPU)
    third.prepare(paths)
    assert read == [data, data]
    assert third.entries[str(larger)].problem is None
    assert third.entries[str(larger)].kind == "jpeg"
    stricter = ImageIndex(config(data__max_image_pixels=10), folder=folder / "cache", device=CPU)
    stricter.prepare(paths)
    assert all(entry.problem for entry in stricter.entries.values())


def test_an_image_that_ends_its_process_is_bad_and_alone(folder):
    """The map is one whose process dies of an image; launch/pool.py gives None then."""
    paths = sorted(str(path) for path in folder.iterdir())
    fatal = next(path for path in paths if "jpeg" in path)
    index = ImageIndex(config(), folder=folder / "i", device=CPU)
    index.prepare(paths, run=lambda check, jobs: (None if fatal in j else check(j) for j in jobs))
    plain = ImageIndex(config(), folder=folder / "j", device=CPU)
    plain.prepare(paths)
    wanted = plain.problems(paths) | {fatal: images_module.DEADLY}
    assert index.problems(paths) == wanted
    again = ImageIndex(config(), folder=folder / "i", device=CPU)
    again.prepare(paths, run=lambda check, jobs: pytest.fail("checked again") if jobs else ())
    assert again.problems(paths) == wanted


def test_damaged_index_is_made_anew(folder):
    paths = [str(folder / name) for name in list(GOOD)[:2]]
    ImageIndex(config(), folder=folder / "cache", device=CPU).prepare(paths)
    (stored,) = (folder / "cache").glob("images-*/*.arrow")
    whole = stored.read_bytes()
    stored.write_bytes(whole[: len(whole) // 2])
    ImageIndex(config(), folder=folder / "cache", device=CPU).prepare(paths)
    assert stored.read_bytes() == whole


def test_index_does_not_mix_up_relative_paths(tmp_path, monkeypatch):
    keys = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        image = tmp_path / name / "x.jpg"
        image.write_bytes(next(iter(GOOD.values())) + name.encode())  # of one size and time
        os.utime(image, ns=(1, 1))
        monkeypatch.chdir(tmp_path / name)
        index = ImageIndex(config(), folder=tmp_path / "cache", device=CPU)
        index.prepare(["x.jpg"])
        keys.append(index.entries["x.jpg"].key)
    assert keys[0] != keys[1]
