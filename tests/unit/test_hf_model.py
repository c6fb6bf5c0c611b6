"""The real model, exported, answers in stock transformers as it does here, for every family."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_asvr.batch import IGNORE, MicroBatch
from megatron_asvr.data import pil
from megatron_asvr.data.conversation import Turn, prompt_ids, prompt_text
from megatron_asvr.data.templates import find_template
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.hf.export import export
from megatron_asvr.hf.importer import read_folder
from megatron_asvr.hf.suite.answer import Answerer
from megatron_asvr.hf.verify import VerifySample, verify
from megatron_asvr.model import sharding
from megatron_asvr.model.asvr import build_model
from megatron_asvr.model.tokenizer import TokenizerConfig, VisualTokenizer
from tests.language_cases import one_rank
from tests.unit import hf_models

QUESTIONS = ("What colour is the circle?", "Is there a blue triangle?")
NEW_TOKENS = 5


@pytest.fixture(scope="module")
def groups():
    with one_rank() as made:
        yield made


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.model"
    return TextTokenizer.train(hf_models.CORPUS * 9, path, vocab_size=330)


def run_config(family, fit):
    cfg = hf_models.config(family)
    return replace(
        cfg,
        train=replace(cfg.train, precision="fp32"),
        data=replace(cfg.data, image_fit=fit, template="vicuna_v1"),
    )


def build(cfg, groups):
    """The model with weights far from their initial size, so that settings matter."""
    described = TokenizerConfig(
        kind="semantic", vision=cfg.model.vision, feature_layer=-2, codebook_sizes=(6, 9)
    )
    codes = VisualTokenizer(described)
    codes.set_codebooks([hf_models.tensor_of(f"c{k}", (k, codes.width)) for k in (6, 9)])
    model = build_model(cfg, groups=groups, tokenizer=codes)
    drawn = {
        name: hf_models.tensor_of(name, x.shape)
        for name, x in sharding.full_state(model, groups=groups)
    }
    sharding.load_weights(model, drawn.get, groups=groups)
    return model.eval()


def batch_of(ids, positions, pixels):
    tokens_BS = torch.tensor([ids])
    nothing = torch.empty(0, dtype=torch.int64)
    return MicroBatch(
        tokens_BS=tokens_BS,
        position_ids_BS=torch.arange(len(ids))[None],
        text_targets_BS=torch.full_like(tokens_BS, IGNORE),
        document_BS=torch.zeros_like(tokens_BS, dtype=torch.int32),
        branch_BS=torch.zeros_like(tokens_BS, dtype=torch.int32),
        index_BS=torch.arange(len(ids))[None],
        image_positions_P=torch.tensor(positions),
        image_patches_P=torch.arange(len(positions)),
        pixel_values_ICHW=pixels,
        image_share=(0, len(pixels)),
        num_images=len(pixels),
        visual_positions_M=nothing,
        visual_patches_M=nothing,
        codes_PD=None,
        sample_ids=["question"],
    )


@torch.no_grad()
def own_sample(model, text, cfg, question, files):
    """What this project itself makes of a question about images."""
    shown = "\n".join(["<image>"] * len(files)) + f"\n{question}"
    turns = [Turn("user", shown)]
    template, patches = find_template(cfg.data.template, text), cfg.model.vision.num_patches
    ids = []
    for i in prompt_ids(turns, template, text):
        ids += [i] * (patches if i == text.image_id else 1)
    positions = [i for i, token in enumerate(ids) if token == text.image_id]
    side, fit = cfg.model.vision.image_size, cfg.data.image_fit
    arrays = [pil.decode(f.read_bytes(), image_size=side, fit=fit) for f in files]
    pixels = torch.from_numpy(pil.normalise(np.stack(arrays)))
    answer, logits = [], None
    for _ in range(NEW_TOKENS):
        hidden_SBH = model.hidden(batch_of([*ids, *answer], positions, pixels))
        logits_ST = model.language_model.logits_full(hidden_SBH[:, 0])
        logits = logits_ST if logits is None else logits
        token = int(logits_ST[-1].argmax())
        if token == text.eos_id:
            break
        answer.append(token)
    content = [{"type": "image"}] * len(files) + [{"type": "text", "text": question}]
    return VerifySample(
        name=question,
        prompt=prompt_text(turns, template),
        images=tuple(files),
        token_ids=tuple(ids),
        pixel_values_ICHW=pixels,
        logits_ST=logits,
        answer_ids=tuple(answer),
        answer=text.decode(answer),
        messages=[{"role": "user", "content": content}],
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Wide, tall, grey, transparent and turned pictures."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(3)
    made = []
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: turn by 90 degrees
    for name, mode, shape, options in [
        ("wide.png", "RGB", (20, 61, 3), {}),
        ("tall.png", "RGB", (90, 33, 3), {}),
        ("grey.png", "L", (40, 40), {}),
        ("clear.png", "RGBA", (37, 50, 4), {}),
        ("turned.jpg", "RGB", (24, 48, 3), {"exif": turned}),
    ]:
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode)
        image.save(folder / name, **options)
        made.append(folder / name)
    return made


@pytest.mark.parametrize(
    ("family", "fit"),
    [
        ("llama", "pad"),
        ("mistral", "square"),
        ("qwen2", "pad"),
        ("qwen3", "square"),
        ("mixtral", "pad"),
        ("qwen3_moe", "square"),
    ],
)
def test_the_exported_model_is_the_trained_model(family, fit, groups, text, files, tmp_path):
    cfg = run_config(family, fit)
    model = build(cfg, groups)
    samples = [
        own_sample(model, text, cfg, QUESTIONS[i % 2], [file]) for i, file in enumerate(files)
    ]
    samples.append(own_sample(model, text, cfg, "And these two?", files[:2]))
    folder = export(
        sharding.full_state(model, groups=groups),
        cfg,
        tokenizer=text.path,
        out=tmp_path / "out",
        template=find_template(cfg.data.template, text),
    )
    report = verify(folder, samples, max_new_tokens=NEW_TOKENS)
    assert report["ok"], report["mismatches"]
    assert report["num_answers_equal"] == report["num_ids_equal"] == len(samples)
    assert report["pixels_max_abs"] < 1e-6
    # and back: the same tensors, the visual head included
    again = read_folder(folder)
    state = dict(sharding.full_state(model, groups=groups))
    assert set(again.names) == set(state)
    assert all(torch.equal(again(name), x) for name, x in state.items())


def test_a_suite_shows_transparency_as_training_did(groups, text, files, tmp_path):
    cfg = run_config("llama", "pad")
    model = build(cfg, groups)
    folder = export(
        sharding.full_state(model, groups=groups),
        cfg,
        tokenizer=text.path,
        out=tmp_path / "out",
        template=find_template(cfg.data.template, text),
    )
    raw = [file for file in files if file.stem in ("clear", "turned")]
    shown = [[Image.open(file)] for file in raw]
    upright = [[pil.upright(file.read_bytes())] for file in raw]
    asked = [QUESTIONS[0]] * len(raw)
    answerer = Answerer(str(folder))
    wanted = answerer.answers(asked, upright, max_new_tokens=NEW_TOKENS)
    assert answerer.answers(asked, shown, max_new_tokens=NEW_TOKENS) == wanted


def test_encoded_bytes_and_pictures_agree(files):
    """What a user hands to the processor as a picture is what training read as bytes."""
    with Image.open(files[0]) as image:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
    once = pil.decode(buffer.getvalue(), image_size=34, fit="pad")
    assert np.array_equal(once, pil.decode(files[0].read_bytes(), image_size=34, fit="pad"))
