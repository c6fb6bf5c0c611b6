"""The rule for ``<image>``: its id, added and spare rows; imported, when a run starts, exported."""

import json
from dataclasses import replace

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron)

import pytest
import torch
import transformers

from megatron_asvr.config.load import load
from megatron_asvr.config.schema import Config, ModelConfig
from megatron_asvr.data.conversation import Turn, prompt_ids
from megatron_asvr.data.templates import find_template
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf.export import export, finalize
from megatron_asvr.hf.importer import read_folder
from megatron_asvr.hf.run import import_weights
from megatron_asvr.hf.vocabulary import EMBEDDING, TABLES, with_rows
from megatron_asvr.train.weight_sources import open_source
from tests.unit import hf_models, hub_folders


def language_folder(folder, family, tokenizer, spare_rows):
    """A language model of transformers with a tokenizer.json, and rows that no token uses."""
    hub_folders.write(tokenizer, folder)
    rows = TextTokenizer(folder).vocab_size - 1 + spare_rows
    language = hf_models.language(family, vocab_size=rows)
    text = TextTokenizer(folder)
    state = hf_models.state(config_of(language), head=False)
    state = {name: x for name, x in state.items() if name.startswith("language_model.")}
    out = folder.with_name(f"{folder.name}-{spare_rows}")
    made = export(state.items(), config_of(language), tokenizer=text.path, out=out, kind="text")
    return finalize(made, out), state


def config_of(language, **changes):
    model = ModelConfig(language=language, vision=hf_models.VISION, visual_head=hf_models.HEAD)
    return Config(model=replace(model, **changes))


def run_from(imported):
    """The configuration that the import proposes to runs."""
    config = load(imported / "config.yaml")
    return replace(config, model=replace(config.model, vision=hf_models.VISION))


@pytest.mark.parametrize(("family", "tokenizer"), [("llama", "llama3"), ("qwen2", "qwen2")])
def test_a_missing_row_is_the_mean_of_the_others(family, tokenizer, tmp_path):
    source, state = language_folder(tmp_path / "lm", family, tokenizer, spare_rows=0)
    assert "<image>" not in (source / "tokenizer.json").read_text()
    import_weights(str(source), str(tmp_path / "imported"))
    again = read_folder(tmp_path / "imported")
    assert all(torch.equal(again(name), x) for name, x in state.items())  # as they were

    config = run_from(tmp_path / "imported")
    text = TextTokenizer(config.model.text_tokenizer)
    rows = len(state[EMBEDDING])
    assert config.model.language.vocab_size == text.vocab_size == rows + 1
    assert text.image_id == rows
    found = open_source(str(tmp_path / "imported"), ["language_model"], config).weights
    for name in TABLES:
        if name in state:
            assert torch.equal(found[name].read()[:rows], state[name])
            assert torch.equal(found[name].read()[rows], state[name].mean(0))
    output = found[TABLES[-1] if TABLES[-1] in state else EMBEDDING].read()
    logits = output @ torch.randn(32, 9)
    assert (logits.argmax(0) != text.image_id).all()

    small = replace(config.model.language, vocab_size=rows - 1)
    with pytest.raises(ConversionError, match=f"vocab_size is {rows}, the run asks for {rows - 1}"):
        open_source(
            str(source),
            ["language_model"],
            replace(config, model=replace(config.model, language=small)),
        )


def test_spare_rows_are_used_and_left_as_they_are(tmp_path):
    source, state = language_folder(tmp_path / "lm", "qwen2", "qwen2", spare_rows=13)
    import_weights(str(source), str(tmp_path / "imported"))
    config = run_from(tmp_path / "imported")
    text = TextTokenizer(config.model.text_tokenizer)
    assert config.model.language.vocab_size == len(state[EMBEDDING]) > text.vocab_size
    found = open_source(str(source), ["language_model"], config).weights
    assert torch.equal(found[EMBEDDING].read(), state[EMBEDDING])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_added_rows_are_rounded_once(dtype):
    x = torch.randn(301, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    grown = with_rows(x, 304)
    assert grown.dtype == dtype
    assert grown.shape == (304, 8)
    assert torch.equal(grown[:301], x)
    assert torch.equal(grown[301:], x.float().mean(0).to(dtype).expand(3, 8))
    assert with_rows(x, 301) is x


@pytest.mark.parametrize(
    ("tokenizer", "name"), [("llama3", "tokenizer"), ("qwen2", "chatml"), ("smollm2", "tokenizer")]
)
def test_an_export_has_the_token_and_our_ids(tokenizer, name, tmp_path):
    text = TextTokenizer(hub_folders.write(tokenizer, tmp_path / "text"))
    cfg = config_of(hf_models.language("llama", vocab_size=text.vocab_size + 5))
    template = find_template(name, text)
    pairs, out = hf_models.state(cfg).items(), tmp_path / "out"
    finalize(export(pairs, cfg, tokenizer=text.path, out=out, template=template), out)
    config = json.loads((out / "config.json").read_text())
    assert config["image_token_index"] == text.image_id
    assert config["text_config"]["vocab_size"] == text.vocab_size + 5
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == template.end_id
    assert generation.get("bos_token_id") == text.bos_id
    given = json.loads((tmp_path / "text" / "tokenizer_config.json").read_text())
    given.pop("chat_template")
    assert json.loads((out / "tokenizer_config.json").read_text()) == given
    processor = transformers.AutoProcessor.from_pretrained(out)
    assert processor.image_token_id == text.image_id
    content = [{"type": "image"}, {"type": "text", "text": "Is it red?"}]
    asked = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    ids = prompt_ids([Turn("user", "<image>\nIs it red?")], template, text)
    assert processor.tokenizer(asked).input_ids == list(ids)
    assert TextTokenizer(out).vocab_size == text.vocab_size
    assert TextTokenizer(out).has_image


def test_a_model_of_images_needs_the_row(tmp_path):
    text = TextTokenizer(hub_folders.write("qwen2", tmp_path / "text"))
    cfg = config_of(hf_models.language("llama", vocab_size=text.vocab_size - 1))
    with pytest.raises(ConversionError, match="<image> included"):
        export({}.items(), cfg, tokenizer=text.path, out=tmp_path / "out")
