"""Folders that transformers writes come in byte for byte; wrong ones are refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_asvr.errors import ConversionError
from megatron_asvr.hf import stock, tables
from megatron_asvr.hf.importer import language_config_from_hf, read_folder, vision_config_from_hf
from tests.unit import hf_models

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES = list(hf_models.LANGUAGES)


def stock_model(kind, family):
    """A random stock model, every tensor of it, norms and biases too."""
    model = hf_models.config(family).model
    if kind == "llava":
        config, name = stock.llava_config(model, IDS, 4), stock.LLAVA_ARCHITECTURE
    else:
        config = stock.text_config(model.language, IDS)
        name = stock.TEXT_ARCHITECTURES[family]
    made = getattr(transformers, name)(config)
    for parameter_name, parameter in made.named_parameters():
        parameter.data.copy_(hf_models.tensor_of(parameter_name, parameter.shape))
    return made


def back(folder):
    """All tensors of a folder under the tables' Hugging Face names, through our layout."""
    rules = {**{r.name: r for r in tables.text_rules(folder.language)}} if folder.language else {}
    if folder.vision:
        rules |= {r.name: r for r in tables.vision_rules(folder.vision)}
    if folder.kind == "llava":
        model = replace(hf_models.config().model, language=folder.language, vision=folder.vision)
        rules = {r.name: r for r in tables.llava_rules(model)}
    assert list(rules) == folder.names
    return {k: v for name, rule in rules.items() for k, v in rule.split(folder(name))}


def on_disk(name, x, family):
    """A tensor in memory as folders hold it: every expert's linears on their own."""
    if family not in tables.EXPERTS:
        return {name: x}
    layer, _, rest = name.partition("mlp.")
    known = tables.EXPERTS[family]
    gate, up, down = known.linears
    if rest == "gate.weight":
        return {layer + known.router: x}
    if rest not in ("experts.gate_up_proj", "experts.down_proj"):
        return {name: x}
    made = {}
    for e, own in enumerate(x):
        names, parts = ((gate, up), own.chunk(2)) if "gate_up" in rest else ((down,), (own,))
        for linear, part in zip(names, parts, strict=True):
            made[f"{layer}{known.expert.format(e)}{linear}.weight"] = part
    return made


def assert_bytes_equal(got, model):
    """Compare with the model's own tensors, wherever they live in memory."""
    theirs = {}
    for name, x in model.state_dict().items():
        name = name.removeprefix("model.") if "vision_tower" in name else name
        name = name.replace("model.multi_modal", "multi_modal")
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        name = name.replace("model.language_model.", "language_model.model.")
        if name == "lm_head.weight" or name.startswith(
            ("model.embed", "model.layers", "model.norm")
        ):
            name = "language_model." + name
        theirs |= on_disk(name, x, model.config.get_text_config().model_type)
    if model.config.tie_word_embeddings:
        del theirs["language_model.lm_head.weight"]
    assert got.keys() == theirs.keys()
    assert all(torch.equal(got[k], theirs[k]) for k in got)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["llava", "text"])
def test_a_saved_model_comes_in_byte_for_byte(kind, family, tmp_path):
    model = stock_model(kind, family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    folder = read_folder(tmp_path)
    assert folder.kind == kind
    assert_bytes_equal(back(folder), model)
    assert folder("nothing.of.ours") is None
    assert language_config_from_hf(tmp_path) == folder.language


@pytest.mark.parametrize("name", ["SiglipModel", "SiglipVisionModel"])
def test_siglip_comes_in_without_text_tower_and_pooling_head(name, tmp_path):
    vision = stock.llava_config(hf_models.config().model, IDS, 4).vision_config
    vision.vision_use_head = True
    tower = transformers.SiglipVisionModel(vision)
    if name == "SiglipModel":
        text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        both = transformers.SiglipConfig(vision_config=vision.to_dict(), text_config=text)
        whole = transformers.SiglipModel(both)
        tower = whole.vision_model
        whole.save_pretrained(tmp_path)
    else:
        tower.save_pretrained(tmp_path)
    folder = read_folder(tmp_path)
    got = {k.removeprefix(tables.HF_VISION): v for k, v in back(folder).items()}
    theirs = {k: v for k, v in tower.state_dict().items() if not k.startswith("head.")}
    assert got.keys() == theirs.keys()
    assert all(torch.equal(got[k], theirs[k]) for k in got)
    assert vision_config_from_hf(tmp_path, feature_layer=-1).feature_layer == -1
    assert replace(folder.vision, init_std=0.02) == hf_models.VISION
    with pytest.raises(ConversionError, match="no language model of a known family"):
        language_config_from_hf(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    stock_model("llava", "llama").save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_old_names_of_the_vision_tower_are_known(saved, copied):
    path = copied / "model.safetensors"
    old = {
        k.replace("vision_tower.", "vision_tower.vision_model."): v
        for k, v in load_file(path).items()
    }
    save_file(old, path, {"format": "pt"})
    now, then = read_folder(saved), read_folder(copied)
    assert now.names == then.names
    assert all(torch.equal(now(name), then(name)) for name in now.names)


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


Q = "language_model.model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), f"1 missing: {Q}"),
        (lambda t: t.update(surplus=torch.zeros(1)), "1 unexpected: surplus"),
        (lambda t: t.update({Q: t[Q][1:]}), r"wrong shape: .*q_proj.weight \[31, 32\] instead of"),
        (
            lambda t: t.update({"lm_head.weight": t["language_model.lm_head.weight"].clone()}),
            "are the same tensor",
        ),
    ],
)
def test_incomplete_or_wrong_folders_are_refused(copied, change, message):
    edit(copied, change)
    with pytest.raises(ConversionError, match=message):
        read_folder(copied)


def test_tied_copy_must_be_a_copy(tmp_path):
    stock_model("text", "qwen2").save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "language_model.output_layer.weight" not in read_folder(tmp_path).names
    edit(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ConversionError, match="set tie_word_embeddings to false"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/tmp/x.safetensors", "model.bin", ".."]
)
def test_an_index_cannot_leave_its_folder(copied, file):
    edit(copied, lambda t: save_file(t, copied.parent / "outside.safetensors"))
    index = {"weight_map": dict.fromkeys(load_file(copied / "model.safetensors"), file)}
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ConversionError, match=r"is not the name of a \.safetensors file in this folder"
    ):
        read_folder(copied)


def test_index_and_shards_must_agree(tmp_path):
    stock_model("text", "llama").save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]  # not alone in its shard
    path.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="disagree on 1 tensors"):
        read_folder(tmp_path)


def test_damage_is_refused(copied):
    whole = copied / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:500])
    with pytest.raises(ConversionError, match="is not a complete safetensors file"):
        read_folder(copied)
    whole.rename(copied / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="is damaged, or holds more than tensors"):
        read_folder(copied)
    (copied / "pytorch_model.bin").unlink()
    with pytest.raises(ConversionError, match="holds no weights; wanted there: model"):
        read_folder(copied)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("architectures",), ["GPT2LMHeadModel"], "architecture 'GPT2LMHeadModel' is unknown"),
        (("text_config", "attention_bias"), True, "attention_bias is True; only False"),
        (("text_config", "hidden_act"), "gelu", "hidden_act is 'gelu'"),
        (
            ("text_config", "rope_parameters"),
            {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            "a rope_type other than default, linear, llama3, yarn",
        ),
        (("vision_feature_select_strategy",), "default", "only 'full' can be converted"),
        (("projector_hidden_act",), "relu", "only 'gelu' can be converted"),
        (("vision_feature_layer",), [-2, -1], "one layer is supported"),
        (("vision_config", "num_channels"), 1, "num_channels is 1"),
    ],
)
def test_what_we_would_compute_differently_is_refused(copied, keys, value, message):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=message):
        read_folder(copied)


def test_settings_of_the_run_must_fit(saved):
    folder, model = read_folder(saved), hf_models.config().model
    folder.check_fits(model, ("language_model", "vision_encoder", "projector"))
    other = replace(model, language=replace(model.language, rope_theta=1e4, num_layers=1))
    with pytest.raises(ConversionError, match="num_layers is 2, the run asks for 1; rope_theta is"):
        folder.check_fits(other, ("language_model",))
    folder.check_fits(other, ("vision_encoder",))
    with pytest.raises(ConversionError, match="holds no visual_head"):
        folder.check_fits(model, ("visual_head",))
