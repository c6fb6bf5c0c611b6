import dataclasses
from pathlib import Path

import pytest

from examples.quickstart import vision
from examples.quickstart.run import VOCAB_SIZE, QuickStart, Short
from megatron_asvr.cli.main import parse
from megatron_asvr.config.check import check
from megatron_asvr.config.load import flatten, load

STAGES = ("warmup", "stage1", "stage2", "blind_stage1", "blind_stage2")


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The `asvr` calls of a quick start in ``tmp_path``, by the name of their phase."""
    calls = {}
    start = QuickStart(out=tmp_path)
    for phase in start.phases():
        monkeypatch.setattr(
            "examples.quickstart.run.asvr",
            lambda *words, name=phase.name: calls.update({name: words}),
        )
        if phase.name not in ("data", "encoder", "text_tokenizer", "ask"):
            phase.run()
    return calls


def configs(commands):
    trained = {name: commands[name] for name in STAGES}
    return {name: check(load(file, changes)) for name, (_, file, *changes) in trained.items()}


def changed(one, other):
    a, b = flatten(one), flatten(other)
    return {key for key in a if a[key] != b[key]}


def test_every_command_is_accepted(commands):
    assert [*commands][:4] == ["visual_tokenizer", "warmup", "stage1", "stage2"]
    for command in commands.values():
        parse([*command])


def test_stages_train_one_model_on_two_ranks(commands):
    found = configs(commands)
    for config in found.values():
        assert config.parallel.tp == 2
        check(config, 2)
        assert config.model.language == found["warmup"].model.language
        assert dataclasses.replace(config.model.vision, feature_layer=-1) == vision.VISION
        assert config.model.language.vocab_size >= VOCAB_SIZE
    assert found["stage1"].train.trainable == ("projector", "visual_head")
    assert "vision_encoder" not in found["stage2"].train.trainable
    assert found["stage2"].model.vision.feature_layer == -2


def test_each_stage_starts_from_the_one_before(commands, tmp_path):
    found = configs(commands)
    assert found["stage1"].init.source("language_model") == found["warmup"].run.dir
    assert found["stage1"].init.source("vision_encoder") == str(tmp_path / "encoder")
    for before, after in (("stage1", "stage2"), ("blind_stage1", "blind_stage2")):
        init = found[after].init
        parts = ("vision_encoder", "projector", "language_model", "visual_head")
        assert {init.source(part) for part in parts} == {found[before].run.dir}


def test_blind_control_differs_in_its_images_alone(commands):
    found = configs(commands)
    first = changed(found["stage1"], found["blind_stage1"])
    assert first == {"run.dir", "data.blank_images"}
    second = changed(found["stage2"], found["blind_stage2"])
    assert second == {"run.dir", "data.blank_images", "init.all"}


def test_no_training_command_names_the_test_split(commands):
    assert not any("test.json" in word for name in STAGES for word in commands[name])
    assert "val.json" in " ".join(commands["stage2"])


def test_files_name_the_folder_that_the_command_fills():
    for stage in ("warmup", "stage1", "stage2"):
        config = load(Path("examples/quickstart") / f"{stage}.yaml")
        named = [v for k, v in flatten(config).items() if isinstance(v, str) and "/" in v]
        assert all(value.startswith("runs/quickstart/") for value in named)
        assert config.run.dir == f"runs/quickstart/{stage}"


def test_short_form_has_the_same_phases(tmp_path):
    whole, short = QuickStart(out=tmp_path), QuickStart(out=tmp_path, short=Short())
    assert [p.name for p in whole.phases()] == [p.name for p in short.phases()]
    differ = [
        a.name for a, b in zip(whole.phases(), short.phases(), strict=True) if a.inputs != b.inputs
    ]
    assert differ == ["data", "encoder", *STAGES[:3], *STAGES[3:]]
