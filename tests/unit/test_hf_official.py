"""An official checkpoint, rebuilt from the recorded weights, gives the recorded losses.

The recorded files hold what the losses depend on, under plain names. Here those become the official
code's names again, and everything else that such a checkpoint holds is put beside them: the last
layers, pooling heads, the unused row of each codebook, the visual branch.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_asvr.cli.main import main
from megatron_asvr.config.load import load, override
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf.importer import read_folder
from megatron_asvr.hf.official import read_official, read_tokenizer
from megatron_asvr.model.asvr import build_model
from megatron_asvr.model.loss import official_loss
from megatron_asvr.model.tokenizer import VisualTokenizer
from megatron_asvr.train.weight_sources import load_sources
from tests import oracle
from tests.language_cases import one_rank

HEADS = "model.vision_tower.vision_tower.vision_model.head."
INSIDE = "model.vision_tokenizer.vision_tower."
SEMANTIC = f"{INSIDE}rqtransformer_semantic."
TOWERS = {
    "tower": "model.vision_tower.vision_tower.vision_model.",
    "tok_siglip": f"{INSIDE}rqvaesiglip.siglip_model.vision_model.",
}
OFFICIAL = (  # plain name of the recorded files, and the official one
    (r"^llm\.", "model."),
    (r"^tower\.", TOWERS["tower"]),
    (r"^tok_siglip\.", TOWERS["tok_siglip"]),
    (r"^codebook\.(\d)$", rf"{INSIDE}rqvaesiglip.quantizer_semantic.codebooks.\1.weight"),
    (r"^mm_projector\.fc1\.", "model.mm_projector.0."),
    (r"^mm_projector\.fc2\.", "model.mm_projector.2."),
    (r"^head\.projector\.fc1\.", "projector.0."),
    (r"^head\.projector\.fc2\.", "projector.2."),
    (r"^head\.in_proj\.", f"{SEMANTIC}in_mlp_1."),
    (r"^head\.norm\.", f"{SEMANTIC}headnorm."),
    (r"^head\.out\.", f"{SEMANTIC}heads."),
    (r"^head\.layers\.(\d)\.norm", rf"{SEMANTIC}head_transformer.\1.layernorm"),
    (
        r"^head\.layers\.(\d)\.attn\.in_proj\.",
        rf"{SEMANTIC}head_transformer.\1.self_attention.in_proj_",
    ),
    (r"^head\.layers\.(\d)\.attn\.", rf"{SEMANTIC}head_transformer.\1.self_attention."),
    (r"^head\.layers\.(\d)\.w(\d)$", rf"{SEMANTIC}head_transformer.\1.linear\2.weight"),
)
CONFIG = {
    "architectures": ["ASVRLlamaForCausalLM"],
    "model_type": "asvr_llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 160,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "pretraining_tp": 1,
    "mm_vision_select_layer": -2,
    "use_s2": False,
}
NUM_HEADS = "model.vision.num_heads=4"


def official_name(plain):
    for pattern, replacement in OFFICIAL:
        name, count = re.subn(pattern, replacement, plain, count=1)
        if count:
            return name
    return plain


def official_state():
    """A checkpoint as the official code would save it."""
    recorded = load_file(oracle.FOLDER / "weights.safetensors")
    state = {official_name(plain): x for plain, x in recorded.items()}
    assert len(state) == len(recorded)
    for depth in range(4):  # the row that no code names would poison everything it touched
        name = f"{INSIDE}rqvaesiglip.quantizer_semantic.codebooks.{depth}.weight"
        state[name] = torch.cat([state[name], torch.full((1, 64), float("nan"))])
        state[name.replace("quantizer_semantic", "quantizer")] = torch.zeros(65, 64)
    for tower in TOWERS.values():
        first = f"{tower}encoder.layers.0."
        last = {k: v for k, v in state.items() if k.startswith(first)}
        state |= {k.replace("layers.0.", "layers.5."): torch.ones_like(v) for k, v in last.items()}
        state[f"{tower}post_layernorm.weight"] = torch.ones(64)
        state[f"{tower}post_layernorm.bias"] = torch.zeros(64)
        state[f"{tower}head.probe"] = torch.zeros(1, 1, 64)
    state[f"{INSIDE}rqvaesiglip.siglip_model.logit_scale"] = torch.zeros(1)
    state[f"{INSIDE}rqvaesiglip.siglip_model.text_model.embeddings.token_embedding.weight"] = (
        torch.zeros(9, 64)
    )
    state[f"{INSIDE}rqvaesiglip.decoder.conv_in.weight"] = torch.zeros(4, 4)
    state[f"{INSIDE}rqtransformer_visual.headnorm.weight"] = torch.zeros(128)
    state[f"{SEMANTIC}head_transformer.0.linear1.bias"] = torch.full((256,), 5.0)
    return {name: x.contiguous() for name, x in state.items()}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Folder of the checkpoint, in two shards."""
    folder = tmp_path_factory.mktemp("official")
    state, index = official_state(), {}
    names = list(state)
    for i, part in enumerate((names[:120], names[120:]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def imported(official, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "out"
    command = ["convert", "import", str(official), "--out", str(out), "--from", "asvr-official"]
    assert main([*command, NUM_HEADS]) == 0
    return out


@pytest.fixture(scope="module")
def groups():
    with one_rank() as made:
        yield made


@pytest.fixture(scope="module")
def model(imported, groups):
    """The model of a run whose preset is the imported folder."""
    config = override(
        load(imported / "config.yaml"),
        ["loss.mode=official", "data.codes=online", "train.precision=fp32"],
    )
    tokenizer = VisualTokenizer.load(config.model.visual_tokenizer)
    made = build_model(config, groups=groups, tokenizer=tokenizer)
    origins = load_sources([made], config, facts={}, groups=groups)
    assert set(origins.values()) == {str(imported)}
    assert len(origins) == 4
    return made


@torch.no_grad()
@pytest.mark.parametrize("case", oracle.cases())
def test_an_imported_checkpoint_gives_the_recorded_losses(case, model):
    batch, wanted = oracle.micro_batch(case, "official"), oracle.expected()[case]
    loss = official_loss(model(batch), visual_weight=1.0)
    assert loss.item() == oracle.approx(wanted["loss"])
    codes = oracle.inputs(case).get("codes")
    if codes is not None:
        assert torch.equal(model.images.codes(batch), codes.flatten(0, 1))


def test_every_weight_is_the_recorded_one(imported):
    source = read_folder(imported)
    for name in source.names:
        if "layers.5." in name or "post_layernorm" in name:
            continue  # not recorded: the losses do not depend on them
        recorded = name.replace("visual_head.codebooks", "codebook")
        plain = load_file(oracle.FOLDER / "weights.safetensors")
        wanted = plain[recorded] if recorded in plain else oracle.canonical_weight(name)
        assert torch.equal(source(name), wanted), name
    report = json.loads((imported / "import.json").read_text())
    assert report["kind"] == "asvr-official"
    assert len(report["ignored"]) == 11
    assert all(re.search("visual|head|logit|text|decoder|quantizer", x) for x in report["ignored"])


def changed(official, tmp_path, change, **config):
    """A copy of the checkpoint, one file, after ``change`` of its tensors and configuration."""
    state = official_state()
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | config))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{SEMANTIC}headnorm.weight"), r"1 missing: head\.headnorm"),
        (lambda s: s.pop("model.mm_projector.2.bias"), r"1 missing: multi_modal_projector"),
        (lambda s: s.update(stray=torch.zeros(1)), "1 unexpected: stray"),
        (lambda s: s.update({"projector.0.bias": torch.zeros(3)}), r"bias \[3\] instead of \[128"),
        (
            lambda s: s.update({f"{INSIDE}rqvaesiglip.prequant_semantic.w": torch.zeros(3)}),
            "projects features before it quantises",
        ),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith(TOWERS["tower"])],
            r"holds nothing of vision_encoder; .*--allow-missing 'vision_encoder\.\*'",
        ),
    ],
)
def test_another_checkpoint_is_refused(official, tmp_path, change, message):
    folder = changed(official, tmp_path, change)
    with pytest.raises(ConversionError, match=message):
        read_official(folder, overrides=[NUM_HEADS])


def test_what_its_files_do_not_tell_must_be_said(official, tmp_path):
    with pytest.raises(ConversionError, match=r"width 64 is none of .* model\.vision\.num_heads=N"):
        read_official(official)
    for setting, value in (("use_s2", True), ("image_aspect_ratio", "anyres")):
        folder = changed(official, tmp_path, lambda s: None, **{setting: value})
        with pytest.raises(ConversionError, match=rf"{setting}={value!r}, .* one view of an image"):
            read_official(folder, overrides=[NUM_HEADS])
    folder = changed(official, tmp_path, lambda s: None, model_type="asvr_phi")
    with pytest.raises(ConversionError, match="'asvr_phi' is derived from none"):
        read_official(folder, overrides=[NUM_HEADS])


def test_a_checkpoint_without_tower_and_tokenizer(official, tmp_path):
    def without(state):
        for name in list(state):
            if name.startswith((TOWERS["tower"], f"{INSIDE}rqvaesiglip.")):
                del state[name]

    folder = changed(official, tmp_path, without)
    allowed = ["vision_encoder.*", "visual_tokenizer.*"]
    with pytest.raises(ConversionError, match=r"wrong shape: multi_modal_projector\.linear_1"):
        read_official(folder, allow_missing=allowed)
    source, tokenizer = read_official(
        folder, overrides=["model.vision.hidden_size=64"], allow_missing=allowed
    )
    assert tokenizer is None
    assert source.vision is None
    assert source.holds("visual_head")
    assert not any("codebooks" in name for name in source.names)


@pytest.mark.parametrize("form", ["checkpoint", "bare", "pickle"])
def test_a_tokenizer_alone(form, official, imported, tmp_path, capsys):
    """As part of a whole checkpoint, and as the file that the official code loads it from."""
    path, out = official, tmp_path / "out"
    if form != "checkpoint":
        inside = f"{INSIDE}rqvaesiglip."
        own = {k.removeprefix(inside): v for k, v in official_state().items() if inside in k}
        own["quantizer_semantic.codebooks.0.cluster_size_ema"] = torch.zeros(64)
        own["quantizer_pixel.codebooks.0.weight"] = torch.zeros(65, 64)
        own["prequant_pixel.norm1.weight"] = torch.zeros(64)
        if form == "pickle":
            path = tmp_path / "epoch_9.pt"
            renamed = {f"module.{k}": v for k, v in own.items()}
            torch.save({"epoch": 9, "name": "x", "state_dict": renamed}, path)
        else:
            path = tmp_path / "tokenizer.safetensors"
            save_file(own, path)
    command = ["convert", "import", str(path), "--out", str(out), "--from", "dualtoken"]
    assert main([*command, NUM_HEADS]) == 0
    fingerprint = VisualTokenizer.load(imported / "visual_tokenizer").fingerprint
    tokenizer = VisualTokenizer.load(out)
    assert tokenizer.fingerprint == fingerprint
    pixels = oracle.inputs("one_each")["images"]
    assert torch.equal(tokenizer.encode(pixels), oracle.tokenizer().encode(pixels))
    assert main([*command, NUM_HEADS]) == 1  # nothing is overwritten
    capsys.readouterr()
    assert main([*command, NUM_HEADS, "--allow-missing", "encoder.*"]) == 1
    assert "--allow-missing encoder.*: a tokenizer alone is complete" in capsys.readouterr().err


def test_dualtoken_says_which_layer_it_quantises(official, tmp_path):
    folder = changed(official, tmp_path, lambda s: None, rqvaesiglip={"layer_sem": 4})
    assert read_tokenizer(folder, overrides=[NUM_HEADS]).config.feature_layer == 4
    assert read_tokenizer(official, overrides=[NUM_HEADS]).config.feature_layer == -2
