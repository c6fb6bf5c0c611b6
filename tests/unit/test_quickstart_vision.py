import contextlib

import torch

from examples.quickstart import data, vision
from examples.quickstart.data import COLOURS, SHAPES, Facts
from megatron_asvr.hf.importer import read_folder


def facts(colour=None, shape=None, absent=()):
    return Facts(colour=colour, shape=shape, absent=frozenset(absent))


def test_captions_are_true_false_or_left_out():
    known = facts("blue", "circle", {*COLOURS, *SHAPES} - {"blue", "circle"})
    half = facts("blue", None, {*COLOURS, "circle"} - {"blue"})
    cases = {
        ("blue", "circle"): (vision.TRUE, vision.FALSE),
        ("blue", None): (vision.TRUE, vision.TRUE),
        ("blue", "triangle"): (vision.FALSE, vision.UNKNOWN),
        ("red", "triangle"): (vision.FALSE, vision.FALSE),
        (None, "rectangle"): (vision.FALSE, vision.UNKNOWN),
    }
    for caption, wanted in cases.items():
        assert caption in vision.captions()
        assert (vision.truth(known, caption), vision.truth(half, caption)) == wanted


def test_augmentation_moves_the_shape_over_its_background():
    pixels = torch.full((1, 3, 64, 64), 200, dtype=torch.uint8)
    pixels[:, :, 20:30, 24:40] = 10
    for seed in range(5):
        moved = vision.augment(pixels, torch.Generator().manual_seed(seed))
        dark, light = vision.normalise(torch.tensor([10, 200]))
        assert ((moved == dark).sum(), (moved == light).sum()) == (480, 3 * 64 * 64 - 480)


def test_every_image_is_used_once_an_epoch():
    per_epoch = 200 // vision.BATCH
    seen = torch.cat([vision.sample(200, step)[0] for step in range(per_epoch)])
    assert len(seen.unique()) == per_epoch * vision.BATCH
    later = vision.sample(200, per_epoch)[0]
    assert not torch.equal(later, seen[: vision.BATCH])


def prepared(tmp_path):
    data.prepare(tmp_path, limit=70)
    return tmp_path


class Stop(Exception):  # noqa: N818
    """What stands for a kill."""


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    for name, value in {"SAVE_EVERY_STEPS": 1, "THREADS": 1, "BATCH": 16}.items():
        monkeypatch.setattr(vision, name, value)
    folder = prepared(tmp_path / "data")
    vision.train(folder, tmp_path / "whole", steps=3, say=lambda line: None)

    def stop(line):
        raise Stop

    for _ in range(2):
        with contextlib.suppress(Stop):
            vision.train(folder, tmp_path / "cut", steps=3, say=stop)
    vision.train(folder, tmp_path / "cut", steps=3, say=lambda line: None)
    whole, cut = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert whole == cut
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [
        "config.json",
        "model.safetensors",
        "quality.json",
    ]


def test_the_folder_is_what_the_package_loads(tmp_path):
    encoder = vision.Contrast().images
    vision.write_folder(encoder, {}, tmp_path / "encoder")
    source = read_folder(tmp_path / "encoder")
    assert source.vision.num_feature_layers == vision.VISION.num_layers - 1
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(source(f"vision_encoder.{name}"), tensor)


def test_probe_separates_what_is_separable():
    x = torch.randn(60, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = (x[:, 1] > 0).long()
    weights = vision.solve_probe(x, torch.nn.functional.one_hot(labels))
    guess = (x @ weights).argmax(-1)
    assert vision.accuracy(guess, labels) > 0.9
    assert vision.accuracy(torch.tensor([1, 0, 2]), torch.tensor([1, 1, -1])) == 0.5
