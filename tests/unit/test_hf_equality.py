"""A folder with a planted error is never taken for what it was made from."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_asvr.cli.main import main
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.errors import CheckpointError, ConversionError
from megatron_asvr.hf.equality import Origin, compare, origin_of, require_equal
from megatron_asvr.hf.export import export, finalize
from megatron_asvr.hf.imported import write_imported
from megatron_asvr.hf.importer import HEAD_FILE, read_folder
from megatron_asvr.hf.run import verify_weights
from megatron_asvr.hf.shards import ShardWriter
from megatron_asvr.parallel.stored import Stored
from tests.unit import hf_models
from tests.unit.test_hf_import import stock_model

CFG = hf_models.config("llama")
Q, K = (f"language_model.model.layers.1.self_attn.{x}_proj.weight" for x in "qk")
FC = [f"vision_tower.vision_model.encoder.layers.{i}.mlp.fc1.weight" for i in (0, 2)]


def origin(cfg=CFG, prefix=""):
    held = {k: Stored.of(x) for k, x in hf_models.state(cfg).items() if k.startswith(prefix)}
    return Origin(name="the run", model=cfg.model, tensors=held)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "text.model"
    return TextTokenizer.train(hf_models.CORPUS * 9, path, vocab_size=330).path


def exported(out, tokenizer, cfg=CFG, **options):
    made = export(origin(cfg).tensors, cfg, tokenizer=tokenizer, out=out, **options)
    return finalize(made, out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    """An export in bf16 and several shards."""
    out = tmp_path_factory.mktemp("exports") / "llava"
    return exported(out, tokenizer, dtype=torch.bfloat16, max_shard_bytes=30_000)


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def change(folder, *names, by):
    """Replace tensors of one model: ``by`` gets and returns them all in a dictionary."""
    files = [folder / HEAD_FILE, *sorted(folder.glob("model*.safetensors"))]
    held = {file: load_file(file) for file in files}
    homes = {name: tensors for tensors in held.values() for name in tensors if name in names}
    changed = by({name: homes[name][name].clone() for name in names})
    for name in names:
        del homes[name][name]
        if name in changed:
            homes[name][name] = changed[name]
    for file, tensors in held.items():
        save_file(tensors, file, {"format": "pt"})


def test_what_was_exported_is_equal(whole, tokenizer, tmp_path):
    report = compare(whole, origin(), dtype=torch.bfloat16)
    assert report["ok"], report
    number = len(hf_models.state(CFG))
    assert report["num_tensors"] == report["num_tensors_equal"] == number
    assert report["share_compared"] == 1
    files = [*whole.glob("model-*.safetensors"), whole / HEAD_FILE]
    assert report["num_bytes_compared"] == sum(
        x.nbytes for file in files for x in load_file(file).values()
    )
    json.dumps(report)
    require_equal(report, "export")
    text = exported(tmp_path / "text", tokenizer, kind="text")
    report = compare(text, origin(prefix="language_model."), dtype=torch.float32)
    assert report["ok"], report
    assert compare(text, origin_of(read_folder(text)))["ok"]


def flipped(tensors):
    for x in tensors.values():
        x.view(torch.uint8).reshape(-1)[-2] ^= 1
    return tensors


def swapped(tensors):
    return dict(zip(tensors, reversed(tensors.values()), strict=True))


@pytest.mark.parametrize(
    ("names", "by", "found"),
    [
        ([Q], flipped, [r"layers.1.self_attention.linear_qkv.* 1 of 2048 numbers differ"]),
        (FC, swapped, [r"layers.0.mlp.fc1.weight", r"layers.2.mlp.fc1.weight"]),
        ([K], lambda _: {}, [r"disagree on 1 tensors, e.g. .*layers.1.self_attn.k_proj"]),
        ([K], lambda t: {K: t[K].float()}, [r"linear_qkv.*parts.*several|stored as .*float32"]),
        ([FC[0]], lambda t: {FC[0]: t[FC[0]].half()}, [r"layers.0.mlp.fc1.* wanted torch.bfloat"]),
        ([FC[0]], lambda t: {FC[0]: t[FC[0]][1:].clone()}, [r"1 wrong shape: .*layers.0.mlp.fc1"]),
        (["heads.1.weight"], flipped, [r"visual_head.heads.1.weight .* 1 of 80 numbers differ"]),
        (["codebooks.0"], flipped, [r"visual_head.codebooks.0 .* 1 of 84 numbers differ"]),
    ],
)
def test_a_planted_error_is_found_and_named(copied, names, by, found):
    change(copied, *names, by=by)
    report = compare(copied, origin(), dtype=torch.bfloat16)
    assert not report["ok"]
    assert report["num_mismatches"] == len(found)
    for pattern in found:
        assert any(re.search(pattern, text) for text in report["mismatches"]), report
    with pytest.raises(ConversionError, match=f"export: {len(found)} mismatches, "):
        require_equal(report, "export")


@pytest.mark.parametrize("file", [HEAD_FILE, "model-00002-of"])
def test_a_truncated_file_is_named(copied, file):
    (path,) = copied.glob(f"{file}*")
    path.write_bytes(path.read_bytes()[:-1])
    report = compare(copied, origin())
    assert not report["ok"]
    assert f"{path} is not a complete safetensors file" in report["mismatches"][0]


def test_another_type_other_settings_and_other_weights_are_seen(whole, copied):
    report = compare(whole, origin(), dtype=torch.float32)
    assert report["num_tensors_equal"] == 2  # the codebooks
    config = json.loads((copied / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 100.0
    (copied / "config.json").write_text(json.dumps(config))
    (problem,) = compare(copied, origin())["mismatches"]
    assert "rope_theta is 100.0" in problem
    held = origin()
    stray = replace(held, tensors={**held.tensors, "projector.stray": Stored.of(torch.ones(1))})
    (problem,) = compare(whole, stray)["mismatches"]
    assert "1 missing: projector.stray" in problem


def test_a_damaged_origin_is_no_proof(whole):
    def check():
        raise CheckpointError("a file of the run is damaged")

    with pytest.raises(CheckpointError, match="a file of the run is damaged"):
        compare(whole, replace(origin(), checks=(check,)))


class WrongPlace(ShardWriter):
    """A writer with a planted error: the second half of one tensor goes where the first belongs."""

    def put(self, name, start, x):
        super().put(name, start, x.roll(x.numel() // 2) if name == FC[1] else x)


def test_an_error_of_the_writer_is_found(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("megatron_asvr.hf.export.ShardWriter", WrongPlace)
    report = compare(exported(tmp_path / "out", tokenizer), origin())
    assert report["num_mismatches"] == 1
    assert "vision_encoder.encoder.layers.2.mlp.fc1.weight" in report["mismatches"][0]


@pytest.mark.parametrize(("kind", "family"), [("llava", "qwen2"), ("text", "mixtral")])
def test_an_import_is_compared_with_its_source(kind, family, tmp_path):
    stock_model(kind, family).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    write_imported(read_folder(tmp_path / "in"), tmp_path / "out")
    assert verify_weights(str(tmp_path / "in"), str(tmp_path / "out"))["ok"]
    name = "language_model.decoder.final_layernorm.weight"
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(torch.uint8)[3] ^= 1
    save_file(tensors, file, {"format": "pt"})
    report = verify_weights(str(tmp_path / "in"), str(tmp_path / "out"))
    assert report["num_mismatches"] == 1
    assert f"{name} ({name}): 1 of 32 numbers differ" in report["mismatches"][0]
    with pytest.raises(ConversionError, match=r"'model\.vision\.num_heads=2': only .* official"):
        verify_weights(
            str(tmp_path / "in"), str(tmp_path / "out"), overrides=["model.vision.num_heads=2"]
        )
    with pytest.raises(
        ConversionError, match=r"runs/x is no folder .*/out was imported from .*/in"
    ):
        verify_weights("runs/x", str(tmp_path / "out"))


def test_behaviour_of_an_import_is_not_compared(tmp_path, capsys):
    stock_model("text", "llama").save_pretrained(tmp_path / "in")
    write_imported(read_folder(tmp_path / "in"), tmp_path / "out")
    command = ["convert", "verify", "runs/x", str(tmp_path / "out"), "--verify", "full"]
    assert main([*command, "--data", "test.json"]) == 1
    assert "is an import, which answers nothing by itself" in capsys.readouterr().err
    weights = ["convert", "verify", str(tmp_path / "in"), str(tmp_path / "out")]
    for option in (["--samples", "4"], ["--images", "x"], ["--max-new-tokens", "4"]):
        assert main([*weights, *option]) == 1
        assert f"{option[0]} belongs to --verify full" in capsys.readouterr().err
    assert main(weights) == 0
    assert json.loads(capsys.readouterr().out)["share_compared"] == 1
