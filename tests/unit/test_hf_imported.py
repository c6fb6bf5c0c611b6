"""`asvr convert import`: complete or refused, and a run starts from what it wrote."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_asvr.cli.main import main
from megatron_asvr.config.load import load, override
from megatron_asvr.errors import CheckpointError, ConversionError
from megatron_asvr.hf.imported import REPORT, write_imported
from megatron_asvr.hf.importer import read_folder
from megatron_asvr.hf.run import import_weights
from megatron_asvr.model import sharding
from megatron_asvr.model.asvr import build_model
from megatron_asvr.train.weight_sources import load_sources
from tests.language_cases import one_rank
from tests.unit.test_hf_import import stock_model

GONE = "model.layers.1.self_attn."


@pytest.fixture(scope="module")
def groups():
    with one_rank() as made:
        yield made


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "source"
    stock_model("text", "mixtral").save_pretrained(folder)
    return folder


@pytest.fixture
def without_attention(text, tmp_path):
    """The same without the first two projections of a layer and its output projection."""
    folder = tmp_path / "incomplete"
    folder.mkdir()
    (folder / "config.json").write_bytes((text / "config.json").read_bytes())
    tensors = load_file(text / "model.safetensors")
    for name in "qkvo":
        del tensors[f"{GONE}{name}_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    return folder


def settings(folder, *overrides):
    """A run that uses the folder's settings as its preset."""
    return override(
        load(folder / "config.yaml"),
        ["loss.visual_weight=0", "train.precision=fp32", *overrides],
    )


@pytest.mark.parametrize(("kind", "family"), [("llava", "qwen2"), ("text", "qwen3_moe")])
@pytest.mark.parametrize("size", [10**9, 20_000])
def test_what_was_imported_is_what_was_there(kind, family, size, tmp_path):
    stock_model(kind, family).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    source = read_folder(tmp_path / "in")
    report = write_imported(source, tmp_path / "out", max_shard_bytes=size)
    assert len(list((tmp_path / "out").glob("model*.safetensors"))) == 1 or size < 10**9
    again = read_folder(tmp_path / "out")
    assert sorted(again.names) == sorted(source.names)
    assert all(torch.equal(again(name), source(name)) for name in source.names)
    assert again(source.names[0]).dtype == torch.bfloat16
    assert again.language == source.language
    assert again.vision == source.vision
    assert report["num_tensors"] == len(source.names)
    assert json.loads((tmp_path / "out" / REPORT).read_text()) == report
    with pytest.raises(ConversionError, match="exists already"):
        write_imported(source, tmp_path / "out")


def test_the_command_writes_what_a_run_starts_from(text, groups, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", "import", str(text), "--out", str(out)]) == 0
    assert "of language_model" in capsys.readouterr().out
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({"preset": "out/config.yaml", "train": {"steps": 1}}))
    config = override(load(run), ["loss.visual_weight=0", "train.precision=fp32"])
    assert config.model.language == read_folder(text).language
    model = build_model(config, groups=groups, tokenizer=None)
    origins = load_sources([model], config, facts={}, groups=groups)
    assert origins["language_model"] == str(out)
    assert origins["projector"].endswith("does not hold it)")
    source = read_folder(text)
    loaded = sharding.full_state(model.language_model, groups=groups, prefix="language_model.")
    assert all(torch.equal(x, source(name)) for name, x in loaded)
    other = override(config, ["model.language.experts_per_token=3"])
    with pytest.raises(ConversionError, match="experts_per_token is 2, the run asks for 3"):
        load_sources([model], other, facts={}, groups=groups)


def test_an_incomplete_source_is_refused_and_leaves_nothing(without_attention, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["convert", "import", str(without_attention), "--out", str(out)]
    assert main(command) == 1
    assert "4 missing: language_model.model.layers.1.self_attn" in capsys.readouterr().err
    # A pattern must name all that is missing.
    layer = "language_model.decoder.layers.1.self_attention"
    assert main([*command, "--allow-missing", f"{layer}.linear_qkv.*"]) == 1
    assert "1 missing: language_model.model.layers.1.self_attn.o_proj" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["incomplete"]


def test_missing_weights_are_named_twice_then_drawn(without_attention, groups, tmp_path, capsys):
    out, layer = tmp_path / "out", "language_model.decoder.layers.1.self_attention."
    command = ["convert", "import", str(without_attention), "--out", str(out)]
    assert main([*command, "--allow-missing", f"{layer}*"]) == 0
    assert "missing (allowed; drawn from run.seed): 2 tensors" in capsys.readouterr().out
    config = settings(out)
    assert config.init.allow_missing == (f"{layer}linear_qkv.weight", f"{layer}linear_proj.weight")
    model = build_model(config, groups=groups, tokenizer=None)
    origins = load_sources([model], config, facts={}, groups=groups)
    assert origins["language_model"] == f"{out} (2 weights from run.seed=0)"
    strict = replace(config, init=replace(config.init, allow_missing=()))
    with pytest.raises(CheckpointError, match=f"2 of .* weights are missing: {layer}"):
        load_sources([model], strict, facts={}, groups=groups)
    # The same straight from the incomplete folder.
    direct = settings(out, f"init.all={without_attention}")
    origins = load_sources([model], direct, facts={}, groups=groups)
    assert origins["language_model"] == f"{without_attention} (2 weights from run.seed=0)"


def test_half_a_matrix_is_never_allowed(text, tmp_path):
    tensors = load_file(text / "model.safetensors")
    del tensors[f"{GONE}q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((text / "config.json").read_bytes())
    with pytest.raises(ConversionError, match=r"1 missing: .*q_proj"):
        import_weights(str(tmp_path), str(tmp_path / "out"), allow_missing=["*"])


def test_a_changed_import_is_noticed(text, tmp_path):
    out = tmp_path / "out"
    import_weights(str(text), str(out))
    tensors = load_file(out / "model.safetensors")
    tensors.popitem()
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(ConversionError, match=r"holds \d+ tensors, but import.json says"):
        read_folder(out)
    (out / REPORT).write_text('{"format": 9}')
    with pytest.raises(ConversionError, match="format 9; this version reads 1"):
        read_folder(out)


def test_damaged_numbers_are_refused(text, tmp_path):
    tensors = load_file(text / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((text / "config.json").read_bytes())
    with pytest.raises(ConversionError, match="holds NaN"):
        import_weights(str(tmp_path), str(tmp_path / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
