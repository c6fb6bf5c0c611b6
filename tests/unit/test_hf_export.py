"""Exports load in stock transformers, compute what the weights say, or are refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_asvr.data.conversation import Turn, prompt_ids
from megatron_asvr.data.templates import find_template
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.errors import ConversionError, DataError
from megatron_asvr.hf import stock, tables
from megatron_asvr.hf.export import export, finalize
from megatron_asvr.hf.importer import read_folder
from megatron_asvr.hf.processor import merges, read_text
from megatron_asvr.hf.verify import VerifySample, verify
from tests.unit import hf_models

FAMILIES = list(hf_models.LANGUAGES)
TEMPLATE = "vicuna_short"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "text.model"
    return TextTokenizer.train(hf_models.CORPUS * 9, path, vocab_size=330)


def template_for(path):
    """The template; none for a file that is no tokenizer."""
    try:
        return find_template(TEMPLATE, TextTokenizer(path))
    except DataError:
        return None


def run_export(out, tokenizer, cfg, state, **options):
    path = getattr(tokenizer, "path", tokenizer)
    made = export(state, cfg, tokenizer=path, out=out, template=template_for(path), **options)
    return finalize(made, out)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer):
    cfg = hf_models.config("llama")
    cfg = replace(cfg, data=replace(cfg.data, image_fit="pad"))
    folder = tmp_path_factory.mktemp("exports") / "llama"
    return run_export(folder, tokenizer, cfg, hf_models.state(cfg).items(), max_shard_bytes=30_000)


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def padded_pixels(image, side):
    """Pad with grey, resize, normalise: what the data pipeline does."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), (127, 127, 127))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    small = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy((small - 127.5) / 127.5).permute(2, 0, 1)


def in_memory(cfg, ids, state):
    """The stock model filled through the tables, without any file."""
    model = transformers.LlavaForConditionalGeneration(
        stock.llava_config(cfg.model, ids.special(), ids.image)
    )
    parts = {k: v for r in tables.llava_rules(cfg.model) for k, v in r.split(state[r.name])}
    loaded = {}
    for name in model.state_dict():
        short = name.removeprefix("model.")
        if short.startswith("vision_tower."):
            short = short.replace("vision_tower.", tables.HF_VISION)
        short = short.replace("language_model.", "language_model.model.")
        short = "language_model.lm_head.weight" if short == "lm_head.weight" else short
        loaded[name] = parts.get(short, parts["language_model.model.embed_tokens.weight"])
    model.load_state_dict(loaded)
    return model.eval()


@torch.no_grad()
def sample_of(model, tokenizer, question, image, cfg):
    """A sample whose "own" results come from ``model`` and this project's data code."""
    turns = [Turn("user", f"<image>\n{question}")]
    ids, patches = [], cfg.model.vision.num_patches
    for i in prompt_ids(turns, find_template(TEMPLATE, tokenizer), tokenizer):
        ids += [i] * (patches if i == tokenizer.image_id else 1)
    pixels = padded_pixels(image, cfg.model.vision.image_size)[None]
    ids_1S = torch.tensor([ids])
    logits = model(input_ids=ids_1S, pixel_values=pixels).logits[0]
    answer = model.generate(
        input_ids=ids_1S, pixel_values=pixels, do_sample=False, max_new_tokens=6
    )[0, len(ids) :].tolist()
    if tokenizer.eos_id in answer:
        answer = answer[: answer.index(tokenizer.eos_id)]
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return VerifySample(
        name=question,
        prompt=f"USER: <image>\n{question} ASSISTANT:",
        images=(image,),
        token_ids=tuple(ids),
        pixel_values_ICHW=pixels,
        logits_ST=logits,
        answer_ids=tuple(answer),
        answer=tokenizer.decode(answer),
        messages=[{"role": "user", "content": content}],
    )


@pytest.fixture(scope="module")
def samples(exported, tokenizer):
    cfg = hf_models.config("llama")
    model = in_memory(cfg, read_text(tokenizer.path, 400).ids, hf_models.state(cfg))
    shapes = [(50, 50), (30, 61), (97, 20)]
    return [
        sample_of(model, tokenizer, f"What is shape {i}?", picture(*s, i), cfg)
        for i, s in enumerate(shapes)
    ]


def test_an_export_verifies_against_the_weights_it_came_from(exported, samples):
    report = verify(exported, samples, max_new_tokens=6)
    assert report["ok"], report
    assert report["num_answers_equal"] == report["num_ids_equal"] == report["num_samples"] == 3
    assert report["logits_max_abs"] <= 1e-5
    assert report["pixels_max_abs"] <= 1e-6  # measured 6e-8
    assert report["logits_max_abs_own_pixels"] <= 1e-4
    json.dumps(report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": (1, 2, 3) * 9}, "first difference at 1"),
        ({"answer": "something else"}, "something else"),
        ({"answer_ids": (5,)}, "answer"),
        ({"messages": [{"role": "user", "content": "no image"}]}, "chat template"),
    ],
)
def test_verify_sees_each_kind_of_difference(exported, samples, change, message):
    sample = samples[1]
    if "token_ids" in change:
        change = {"token_ids": (sample.token_ids[0], 9, *sample.token_ids[2:])}
    report = verify(exported, [replace(sample, **change)], max_new_tokens=6)
    assert not report["ok"]
    assert any(message in m for m in report["mismatches"]), report["mismatches"]


def test_verify_sees_wrong_pixels_and_logits(exported, samples):
    sample = samples[2]
    stretched = sample.pixel_values_ICHW.roll(3, -1)
    logits = sample.logits_ST.clone()
    logits[4, 7] += 3e-4
    nan = torch.full_like(logits, float("nan"))
    for change, key in [
        ({"pixel_values_ICHW": stretched}, "pixels_mean_abs"),
        ({"logits_ST": logits}, "logits_max_abs"),
        ({"logits_ST": nan}, "logits_max_abs"),
    ]:
        report = verify(exported, [replace(sample, **change)], max_new_tokens=6)
        assert not report["ok"]
        assert any(key in m for m in report["mismatches"])


def test_verify_refuses_a_folder_that_does_not_load_completely(copied, samples):
    shard = next(copied.glob("model-00001*.safetensors"))
    tensors = load_file(shard)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(ConversionError, match="does not load completely"):
        verify(copied, samples, max_new_tokens=6)
    with pytest.raises(ConversionError, match="at least one sample"):
        verify(copied, [], max_new_tokens=6)


def test_a_changed_setting_is_seen(copied, samples):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 100.0
    path.write_text(json.dumps(config))
    report = verify(copied, samples, max_new_tokens=6)
    assert report["logits_max_abs"] > 1e-3
    assert not report["ok"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_byte_for_byte(family, dtype, tmp_path, tokenizer):
    cfg = hf_models.config(family)
    state = hf_models.state(cfg)
    folder = run_export(tmp_path / "out", tokenizer, cfg, state.items(), dtype=dtype)
    again = read_folder(folder)
    assert set(again.names) == set(state)
    for name, x in state.items():
        wanted = x if ".codebooks." in name else x.to(dtype)
        assert torch.equal(again(name), wanted), name
    again.check_fits(cfg.model, ("language_model", "vision_encoder", "projector", "visual_head"))
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values())
    assert model.dtype == dtype
    assert (model.config.text_config.rope_parameters["rope_theta"]) == cfg.model.language.rope_theta


def test_the_folder_says_what_it_is(exported, tokenizer):
    config = json.loads((exported / "config.json").read_text())
    assert config["image_token_index"] == tokenizer.image_id
    assert config["image_seq_length"] == hf_models.VISION.num_patches
    assert config["vision_feature_select_strategy"] == "full"
    assert config["vision_feature_layer"] == -2
    assert config["projector_hidden_act"] == "gelu"
    assert config["text_config"]["vocab_size"] == 400
    assert config["text_config"]["rope_theta"] == 5e5  # transformers 4 reads it here
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_id
    assert generation["bos_token_id"] == tokenizer.bos_id
    assert generation["pad_token_id"] == tokenizer.pad_id
    processor = transformers.AutoProcessor.from_pretrained(exported)
    assert processor.num_additional_image_tokens == 0
    assert processor.image_processor.do_pad
    assert "padded to a square with grey" in (exported / "README.md").read_text()
    assert (exported / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
    head = json.loads((exported / "visual_head_config.json").read_text())
    assert head["codebook_sizes"] == [7, 5]
    assert head["target_shift"] == 0
    assert load_file(exported / "visual_head.safetensors")["codebooks.1"].shape == (5, 12)


NORM = "language_model.decoder.final_layernorm.weight"
HEAD_BIAS = "visual_head.heads.1.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(NORM), f"1 missing: {NORM}"),
        (lambda s: s.pop(HEAD_BIAS), f"1 missing: {HEAD_BIAS}"),
        (lambda s: s.update(stray=torch.ones(1)), "1 unexpected: stray"),
        (
            lambda s: s.update({"visual_head.stray": torch.ones(1)}),
            "1 unexpected: visual_head.stray",
        ),
        (lambda s: s.update({NORM: torch.ones(31)}), r"final_layernorm.weight \[31\] instead of"),
        (lambda s: s[NORM].fill_(float("nan")), "holds NaN"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("visual_head.")], "no visual head"),
    ],
)
def test_incomplete_or_wrong_weights_are_refused(change, message, tmp_path, tokenizer):
    cfg = hf_models.config()
    state = hf_models.state(cfg)
    change(state)
    with pytest.raises(ConversionError, match=message):
        run_export(tmp_path / "out", tokenizer, cfg, state.items())
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_comes_twice_is_refused(tmp_path, tokenizer):
    cfg = hf_models.config()
    pairs = list(hf_models.state(cfg).items())
    with pytest.raises(ConversionError, match=f"{NORM} came twice"):
        run_export(tmp_path / "out", tokenizer, cfg, [*pairs, (NORM, dict(pairs)[NORM])])


def test_a_baseline_has_no_head_file(tmp_path, tokenizer):
    cfg = hf_models.config()
    cfg = replace(cfg, loss=replace(cfg.loss, visual_weight=0.0))
    folder = run_export(tmp_path / "out", tokenizer, cfg, hf_models.state(cfg, head=False).items())
    assert not list(folder.glob("visual_head*"))


def test_nothing_is_overwritten(exported, tmp_path, tokenizer):
    cfg = hf_models.config()
    with pytest.raises(ConversionError, match="exists already"):
        run_export(exported, tokenizer, cfg, hf_models.state(cfg).items())
    made = export(hf_models.state(cfg).items(), cfg, tokenizer=tokenizer.path, out=tmp_path / "a")
    (tmp_path / "a").mkdir()
    with pytest.raises(ConversionError, match="exists already"):
        finalize(made, tmp_path / "a")


def test_the_language_model_alone(tmp_path, tokenizer):
    cfg = hf_models.config("qwen3")
    state = hf_models.state(cfg)
    folder = run_export(tmp_path / "out", tokenizer, cfg, state.items(), kind="text")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    text = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = "USER: Is it red? ASSISTANT:"
    asked = text.apply_chat_template(
        [{"role": "user", "content": "Is it red?"}], add_generation_prompt=True, return_dict=False
    )
    assert asked == [tokenizer.bos_id, *tokenizer.encode(prompt)] == text(prompt).input_ids
    again = read_folder(folder)
    assert all(torch.equal(again(name), state[name]) for name in again.names)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, tokenizer):
    cfg = hf_models.config()
    small = replace(cfg.model, language=replace(cfg.model.language, vocab_size=300))
    pairs = hf_models.state(cfg).items()
    with pytest.raises(ConversionError, match="the model's vocabulary is 300"):
        run_export(tmp_path / "a", tokenizer, replace(cfg, model=small), pairs)
    changing = hf_models.train_tokenizer(tmp_path / "t", normalization_rule_name="nmt_nfkc")
    with pytest.raises(ConversionError, match="never normalises text"):
        run_export(tmp_path / "a", changing, cfg, pairs)
    (tmp_path / "t").write_text("no model")
    with pytest.raises(ConversionError, match="is not a SentencePiece model"):
        run_export(tmp_path / "a", tmp_path / "t", cfg, pairs)


def test_a_tokenizer_without_image_symbol_gets_it_as_next_id(tmp_path):
    path = hf_models.train_tokenizer(tmp_path / "t", user_defined_symbols=[])
    ours = TextTokenizer(path)
    cfg = hf_models.config()
    folder = run_export(tmp_path / "out", path, cfg, hf_models.state(cfg).items())
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert processor.image_token_id == ours.image_id == ours.vocab_size - 1
    text = "USER: <image>\nIs it red? ASSISTANT:"
    assert processor.tokenizer(text).input_ids == [ours.bos_id, *ours.encode(text)]


def test_merges_follow_scores_and_join_runs_from_the_left():
    low = -1e9  # as in Llama's and Mistral's files
    scores = {"_": low, "__": low, "___": low, "b": -30.0, "_b": -28.0}
    assert merges(scores) == [("_", "b"), ("__", "_"), ("_", "__"), ("_", "_")]


def test_user_defined_symbols_stay_whole(tmp_path):
    path = hf_models.train_tokenizer(tmp_path / "t", user_defined_symbols=["<image>", "[SEP]"])
    ours, cfg = TextTokenizer(path), hf_models.config()
    folder = run_export(tmp_path / "out", path, cfg, hf_models.state(cfg).items())
    text = transformers.AutoTokenizer.from_pretrained(folder)
    ids = text("USER: What[SEP]colour is it?").input_ids
    assert ids == [ours.bos_id, *ours.encode("USER: What[SEP]colour is it?")]
    assert ids.count(text.convert_tokens_to_ids("[SEP]")) == 1
