"""Bad images are found before decoding or by it; good ones agree with the PIL reference."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_asvr.data import images as images_module
from megatron_asvr.data import pil
from megatron_asvr.data.gate import refusal
from megatron_asvr.data.images import ImageIndex
from megatron_asvr.data.pixels import BLANK_KEY, ZERO_KEY, PixelStore, image_decoder
from megatron_asvr.errors import DataError
from tests.unit.data_corpus import config
from tools.make_dirty_images import bad_images, damaged_payload, encode, good_images, picture

CPU = torch.device("cpu")
GOOD, BAD = dict(good_images()), dict(bad_images())
ONLY_DECODING_TELLS = "payload.png"


@pytest.fixture(scope="module")
def decoder():
    return image_decoder(config(), CPU)


@pytest.mark.parametrize("fit", ["square", "pad"])
def test_gate_passes_good_images_and_refuses_bad_ones(fit):
    for name, data in GOOD.items():
        assert refusal(data, max_pixels=10**6, fit=fit) is None, name
    for name, data in BAD.items():
        refused = refusal(data, max_pixels=10**6, fit=fit) is not None
        assert refused != (name == ONLY_DECODING_TELLS), name


def test_pixel_limit_counts_the_padded_square():
    data = encode(picture(np.random.default_rng(0), 200, 50), "PNG")
    assert refusal(data, max_pixels=10_000, fit="square") is None
    assert "200x50 pixels padded to a square" in refusal(data, max_pixels=10_000, fit="pad")
    assert refusal(data, max_pixels=40_000, fit="pad") is None


def test_bombs_cost_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("bomb.png", "lying_header.png"):
            assert "pixels" in refusal(BAD[name], max_pixels=50_000_000, fit="square")


@pytest.mark.parametrize("fit", ["square", "pad"])
@pytest.mark.parametrize("size", [48, 224])
def test_dali_agrees_with_pil(fit, size):
    """Decoding is bit-exact; the two bicubic filters differ in rounding only."""
    dali = image_decoder(config(model__vision__image_size=size, data__image_fit=fit), CPU)
    ours = dali.decode(list(GOOD.values())).numpy().astype(int)
    for name, got in zip(GOOD, ours, strict=True):
        want = pil.decode(GOOD[name], image_size=size, fit=fit).astype(int)
        difference = np.abs(got - want)
        assert difference.max() <= 16, name  # of 255; measured 11 over 5 seeds of this corpus
        assert difference.mean() <= 0.3, name  # measured 0.192; without antialiasing over 0.5


def test_same_size_image_is_bit_exact(decoder):
    data = encode(picture(np.random.default_rng(1), 16, 16), "PNG")
    np.testing.assert_array_equal(
        decoder.decode([data])[0].numpy(), pil.decode(data, image_size=16, fit="square")
    )


def test_result_does_not_depend_on_the_batch(decoder):
    data = list(GOOD.values())
    many = decoder.decode(data * 2)
    assert len(many) == 2 * len(data) > 64
    for place in (0, 7, len(data) + 3):
        alone = decoder.decode([data[place % len(data)]])[0]
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
        decoded = store._decoder.decode([Path(paths[key]).read_bytes()])[0]
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
        return refusal(encoded, **limits)

    monkeypatch.setattr(images_module, "refusal", noting)
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
    stricter = ImageIndex(config(data__max_image_pixels=10), folder=folder / "cache", device=CPU)
    stricter.prepare(paths)
    assert all(entry.problem for entry in stricter.entries.values())


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
