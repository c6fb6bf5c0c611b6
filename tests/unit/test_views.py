"""Views of pictures: the grids, sizes and positions of LLaVA-NeXT, and their pixels."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava_next import modeling_llava_next as next_model

from megatron_asvr.config.check import check
from megatron_asvr.config.load import from_dict, to_dict
from megatron_asvr.config.schema import ModelConfig, ResolutionConfig, VisionConfig
from megatron_asvr.data.decode import Decoder
from megatron_asvr.data.gate import upright_size
from megatron_asvr.data.pil import decode_views
from megatron_asvr.data.pixels import BLANK_KEY, PixelStore
from megatron_asvr.data.views import (
    NEWLINE,
    ImageLayouts,
    best_grid,
    inside,
    picture_key,
    unpadded,
)
from megatron_asvr.errors import ConfigError, DataError
from megatron_asvr.model.vision import join_scales
from tests.unit.data_corpus import config

CPU = torch.device("cpu")
GRIDS = ResolutionConfig().grids
SIZES = [(h, w) for h in (1, 15, 37, 60, 201) for w in (3, 31, 64, 100, 640)]
ANYRES = ResolutionConfig(mode="anyres")


def layouts(patches=3, **settings):
    vision = VisionConfig(image_size=32 * patches, patch_size=32)
    resolution = ResolutionConfig(mode="anyres", **settings)
    return ImageLayouts(ModelConfig(vision=vision, resolution=resolution))


def picture(height, width, kind="PNG", **options):
    small = np.random.default_rng(height).integers(0, 255, (5, 6, 3)).astype(np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("side", [14, 384])
def test_grid_and_inner_size_are_those_of_transformers(side):
    pinpoints = [(rows * side, columns * side) for rows, columns in GRIDS]
    for size in SIZES:
        canvas = select_best_resolution(size, pinpoints)
        rows, columns = best_grid(size, ANYRES, side)
        assert (rows * side, columns * side) == canvas
        wanted = get_patch_output_size(np.zeros((*size, 3)), canvas, "channels_last")
        assert inside(size, canvas) == wanted


@pytest.mark.parametrize("patches", [2, 3, 27])
def test_unpadding_is_that_of_transformers(patches):
    for size in SIZES:
        for rows, columns in GRIDS:
            grid = torch.arange(rows * columns * patches**2).view(1, rows * patches, -1)
            wanted = next_model.unpad_image(grid, size)[0]
            assert torch.equal(grid[0][unpadded(size, tuple(grid.shape[1:]))], wanted), size


@pytest.mark.parametrize("unpad", [False, True])
@pytest.mark.parametrize("newline", [False, True])
def test_positions_hold_what_transformers_packs(newline, unpad, monkeypatch):
    """Each patch is its own number, so what is packed says which patch is where."""
    made, n = layouts(newline=newline, unpad=unpad), 3
    pinpoints = [[rows * 96, columns * 96] for rows, columns in GRIDS]
    stock = next_model.LlavaNextModel.__new__(next_model.LlavaNextModel)
    torch.nn.Module.__init__(stock)
    vision = VisionConfig(image_size=96, patch_size=32)
    stock.config = type("C", (), {"vision_config": vision, "image_grid_pinpoints": pinpoints})
    if not unpad:
        monkeypatch.setattr(next_model, "unpad_image", lambda x, _: x)
    for size in SIZES:
        layout = made.of(size)
        numbers = torch.arange(layout.num_views * n * n).view(layout.num_views, -1, 1)
        last = torch.tensor([NEWLINE]) if newline else None
        (packed,), _ = stock.pack_image_features([numbers], [list(size)], "full", last)
        assert layout.patches_L.tolist() == packed[:, 0].tolist(), size
        assert layout.length == len(packed)


def test_keys_of_views_name_the_picture():
    layout = layouts().of((50, 300))
    keys = layout.keys("abc")
    assert keys == ["abc", "abc@1x3.0", "abc@1x3.1", "abc@1x3.2"]
    assert [picture_key(key) for key in keys] == ["abc"] * 4


def test_without_tiles_a_picture_is_one_view_of_whatever_size():
    made = ImageLayouts(ModelConfig(vision=VisionConfig(image_size=64, patch_size=32)))
    assert not made.needs_sizes
    assert made.of((5, 900)) is made.of((1, 1))
    assert made.of((1, 1)).patches_L.tolist() == [0, 1, 2, 3]
    assert made.of((1, 1)).keys("abc") == ["abc"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_sizes_are_upright_without_decoding(kind):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        encoded = picture(20, 31, kind, exif=exif)
        assert upright_size(encoded) == ((31, 20) if orientation > 4 else (20, 31))


def test_dali_cuts_the_tiles_of_the_reference():
    settings = config(model__vision__image_size=32, model__resolution__mode="anyres")
    pictures = [picture(*size) for size in [(30, 40), (31, 100), (90, 20), (64, 64), (300, 7)]]
    decoder = Decoder(settings, CPU)
    for encoded, got in zip(pictures, decoder.views(pictures), strict=True):
        want = decode_views(
            encoded, image_size=32, fit="square", resolution=settings.model.resolution
        )
        difference = np.abs(got.numpy().astype(int) - want.astype(int))
        assert got.shape == want.shape
        assert difference.max() <= 10
        assert difference.mean() < 0.5


def test_tiles_show_the_picture_in_place_and_black_around_it():
    resolution = {"mode": "anyres", "grids": [[2, 2]]}
    settings = config(model__vision__image_size=16, model__resolution=resolution)
    colours = np.zeros((32, 64, 3), np.uint8)
    colours[:, :32], colours[:, 32:] = (200, 0, 0), (0, 0, 200)
    file = io.BytesIO()
    Image.fromarray(colours).save(file, "PNG")
    (views,) = Decoder(settings, CPU).views([file.getvalue()])
    assert views.shape == (5, 3, 16, 16)  # a grid of 2 x 2, a quarter above and below is empty
    assert (views[1:3, :, :8] == 0).all()
    assert (views[1, 0, 8:, :14] == 200).all()
    assert (views[4, 2, :8, 2:] == 200).all()
    assert (views[3:, :, 8:] == 0).all()


def test_the_store_decodes_a_picture_once_for_all_views(tmp_path, monkeypatch):
    settings = config(model__vision__image_size=16, model__resolution__mode="anyres")
    (tmp_path / "a@b.png").write_bytes(picture(40, 20))
    store = PixelStore(settings, device=CPU)
    key = str(tmp_path / "a@b.png")
    names = ImageLayouts(settings.model).of(store.size(key)).keys(key)
    assert len(names) == 3
    last = store.normalised(names[2:], {key: key})
    monkeypatch.setattr(PixelStore, "_decode", lambda self, wanted: {} if not wanted else 1 / 0)
    everything = store.normalised(names, {key: key})
    assert torch.equal(everything[2:], last)
    assert not torch.equal(everything[1], everything[2])
    with pytest.raises(DataError, match=r"no picture with the view x@1x2\.0"):
        store.normalised(["x@1x2.0"], {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__resolution__unpad": True}, "needs model.resolution.mode=anyres"),
        ({"grids": ()}, "must be pairs"),
        ({"grids": ((1, 2), (1, 2))}, "none twice"),
        ({"grids": ((1, 2, 3),)}, "must be pairs"),
        ({"grids": ((0, 2),)}, "must be pairs"),
        ({"grids": ((4, 8),)}, "takes up to 132 positions.*at least 133"),
        ({"grids": ((4, 7),), "newline": True}, "takes up to 124 positions.*at least 125"),
        ({"data__image_fit": "pad"}, "needs data.image_fit=square"),
        ({"loss__mode": "official"}, "needs loss.mode=exact"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    own = {k: v for k, v in changes.items() if "__" not in k}
    mode = "single" if "model__resolution__unpad" in changes else "anyres"
    wrong = config(
        model__resolution__mode=mode,
        data__max_length=120,
        **{f"model__resolution__{k}": v for k, v in own.items()},
        **{k: v for k, v in changes.items() if "__" in k},
    )
    with pytest.raises(ConfigError, match=message):
        check(wrong)


def test_settings_come_back_from_a_file():
    made = config(model__resolution={"mode": "anyres", "grids": [[1, 2], [2, 1]], "newline": True})
    assert made.model.resolution.grids == ((1, 2), (2, 1))
    assert from_dict(to_dict(made)) == made


S2 = ResolutionConfig(mode="s2", scales=(1, 2, 3))


@pytest.mark.parametrize("fit", ["square", "pad"])
def test_every_scale_is_the_whole_picture_cut_to_the_encoders_size(fit):
    settings = config(
        model__vision__image_size=16, model__resolution={"mode": "s2"}, data__image_fit=fit
    )
    encoded = picture(40, 70)
    (got,) = Decoder(settings, CPU).views([encoded])
    want = decode_views(encoded, image_size=16, fit=fit, resolution=S2)
    assert got.shape == want.shape == (14, 3, 16, 16)
    assert np.abs(got.numpy().astype(int) - want.astype(int)).max() <= 10
    large = decode_views(encoded, image_size=32, fit=fit, resolution=ResolutionConfig())[0]
    assert (want[2] == large[:, :16, 16:]).all()  # the second crop of the second scale


def test_scales_are_joined_as_area_interpolation_does():
    grid, width = 3, 5
    pictures = torch.randn(2, width, 6 * grid, 6 * grid, generator=torch.Generator().manual_seed(0))
    area = torch.nn.functional.interpolate
    crops, wanted = [], []
    for one in pictures:
        parts = []
        for scale in S2.scales:
            large = area(one[None], size=scale * grid, mode="area")[0]
            cut = large.unflatten(1, (scale, grid)).unflatten(3, (scale, grid))
            crops.append(cut.permute(1, 3, 2, 4, 0).reshape(scale**2, grid**2, width))
            parts.append(area(large[None], size=grid, mode="area")[0].flatten(1).T)
        wanted.append(torch.cat(parts, dim=-1))
    got = join_scales(torch.cat(crops), S2, grid)
    torch.testing.assert_close(got, torch.stack(wanted))
    assert join_scales(torch.empty(0, grid**2, width), S2, grid).shape == (0, grid**2, 3 * width)


def test_the_tokenizer_sees_the_first_scale(tmp_path):
    (tmp_path / "a.png").write_bytes(picture(40, 20))
    key = str(tmp_path / "a.png")
    one, three = (
        PixelStore(config(model__resolution={"mode": mode}), device=CPU).normalised(
            [key, BLANK_KEY], {key: key}
        )
        for mode in ("single", "s2")
    )
    assert (len(one), len(three)) == (2, 28)
    assert torch.equal(three[::14], one)


def test_scales_must_begin_with_the_encoders_own_size():
    wrong = config(model__resolution={"mode": "s2", "scales": [2, 3]})
    with pytest.raises(ConfigError, match="must begin with 1"):
        check(wrong)
