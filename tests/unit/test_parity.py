"""DALI's pixels and codes against the reference's, by kind; kinds that flip too much go to PIL."""

import json
from dataclasses import replace

import pytest
import torch

from megatron_asvr.cli.main import main
from megatron_asvr.config.load import save
from megatron_asvr.config.schema import ResolutionConfig
from megatron_asvr.data.dali.pipeline import ImageDecoder
from megatron_asvr.data.decode import takes_pil
from megatron_asvr.data.pixels import PixelStore
from megatron_asvr.data.sources import Sources
from megatron_asvr.errors import ConfigError, DataError
from megatron_asvr.model.tokenizer import TokenizerConfig, VisualTokenizer
from megatron_asvr.train.parity import Parity, check_parity, measure
from tests.language_cases import one_rank
from tests.run_data import make_files, run_config
from tools.make_dirty_images import good_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run over images of every kind, with a tokenizer whose codebooks are fitted to them."""
    folder = make_files(tmp_path_factory.mktemp("parity") / "files", images=1)
    records = []
    for name, data in good_images():
        (folder / "images" / name).write_bytes(data)
        talk = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes"}]
        records.append({"id": name, "image": name, "conversations": talk})
    (folder / "train.json").write_text(json.dumps(records))
    config = run_config(folder, folder.parent / "run", data__eval=[])
    sources = prepared(config)
    # Of pixels, with many codes: each step of the residual is close to what decoders differ by.
    tokenizer = VisualTokenizer(
        TokenizerConfig(
            kind="appearance",
            vision=config.model.vision,
            feature_layer=None,
            codebook_sizes=(128, 128, 128),
        )
    )
    pixels = PixelStore(config, device=CPU).normalised(sources.good_image_keys(), sources.paths)
    tokenizer.fit(iter([tokenizer.features(pixels)]), seed=0, iters=5)
    tokenizer.save(folder / "fitted")
    return replace(config, model=replace(config.model, visual_tokenizer=str(folder / "fitted")))


def prepared(config):
    sources = Sources(config, config.data.train, device=CPU)
    sources.prepare()
    return sources


def measured(config):
    tokenizer = VisualTokenizer.load(config.model.visual_tokenizer)
    return {each.kind: each for each in measure(config, prepared(config), tokenizer, device=CPU)}


def test_parity_of_every_kind(run):
    found = measured(run)
    assert {"jpeg", "jpeg_progressive", "jpeg_cmyk", "png_palette", "png_16bit", "webp"} <= set(
        found
    )
    for kind, each in found.items():
        assert each.decoder == ("pil" if takes_pil(kind) else "dali")
        assert len(each.flips_D) == 3
        if each.decoder == "pil":
            assert (each.pixel_max, each.flips_D) == (0, (0.0, 0.0, 0.0))
        else:
            assert each.pixel_max > 0
            assert 0 < each.pixel_mean < 3
    # Measured 0.083: one patch in twelve.
    assert max(each.flips_D[0] for each in found.values()) <= 0.25
    assert found["jpeg"].images == 9


def test_tiles_are_compared_too(run, monkeypatch):
    anyres = ResolutionConfig(mode="anyres", grids=((1, 2), (2, 1), (2, 2)))
    model = replace(run.model, resolution=anyres)
    tiled = replace(run, model=model, data=replace(run.data, max_length=1024))
    sound = measured(tiled)
    assert sound["jpeg"].images == 9
    assert 0 < sound["jpeg"].pixel_mean < 3
    views = ImageDecoder.views

    def spoiled(self, encoded):  # the last tile of each image alone
        return [torch.cat([x[:-1], 255 - x[-1:]]) for x in views(self, encoded)]

    monkeypatch.setattr(ImageDecoder, "views", spoiled)
    found = measured(tiled)
    assert found["jpeg"].pixel_mean > sound["jpeg"].pixel_mean + 10
    assert found["jpeg"].flips_D[0] > sound["jpeg"].flips_D[0] + 0.1


def test_limits_are_of_all_depths_or_of_each():
    each = Parity(
        kind="jpeg", images=1, decoder="dali", pixel_max=1, pixel_mean=0.1, flips_D=(0.01, 0.2)
    )
    assert each.exceeds((0.1,))
    assert not each.exceeds((0.2,))
    assert not each.exceeds((0.01, 0.2))
    assert each.exceeds((0.001, 0.2))
    assert each.exceeds((0.01, 0.1))


def test_a_run_refuses_or_routes_kinds_that_flip(run):
    def limited(**settings):
        return replace(run, data=replace(run.data, **settings))

    flipping = [kind for kind, each in measured(run).items() if max(each.flips_D) > 0]
    assert flipping
    with one_rank() as groups:
        loose = limited(parity_max_flip=(1.0,))
        assert check_parity(loose, groups=groups) is loose
        with pytest.raises(DataError, match=rf"{flipping[0]}.*set data\.pil_kinds=\["):
            check_parity(limited(parity_max_flip=(0.0,)), groups=groups)
        routed = check_parity(limited(parity_max_flip=(0.0,), on_parity="pil"), groups=groups)
    assert sorted(routed.data.pil_kinds) == sorted(flipping)
    assert all(max(each.flips_D) == 0 for each in measured(routed).values())


def test_a_limit_for_some_depths_only_is_refused(run):
    wrong = replace(run, data=replace(run.data, parity_max_flip=(0.1, 0.1)))
    with (
        one_rank() as groups,
        pytest.raises(ConfigError, match=r"data\.parity_max_flip has 2 values.*3 depths"),
    ):
        check_parity(wrong, groups=groups)


def test_the_command_prints_a_table_writes_json_and_refuses(run, tmp_path, capsys):
    save(run, tmp_path / "run.yaml")
    command = ["data", "parity", str(tmp_path / "run.yaml"), "--images", "2"]
    assert main([*command, "--out", str(tmp_path / "parity.json")]) == 0
    printed = capsys.readouterr().out
    kinds = json.loads((tmp_path / "parity.json").read_text())["kinds"]
    for each in kinds:
        assert f"\n{each['kind']} " in printed
        assert each["images"] <= 2
    assert main([*command, "data.parity_max_flip=[0]"]) == 1
    assert "set data.pil_kinds=" in capsys.readouterr().err
