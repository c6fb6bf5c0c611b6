"""Token ids equal Hugging Face's; templates and the exported chat template say the same text."""

import pytest

from megatron_asvr.data.conversation import Turn, prompt_ids, render
from megatron_asvr.data.templates import find_template
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.errors import ConfigError, DataError
from tests.unit.data_corpus import TEXTS

PROMPTS = [
    "USER: <image>\nWhat color is the circle? ASSISTANT:",
    "<image>\nWhat color",
    "<image>What  is it",
    "A <image> B<image>\n c <image>",
    "  two leading spaces",
    "",
    "a  b\n\nyes",
    "byte fallback: \u00e9\u65e5 \U0001f600",
    "USER: hi ASSISTANT: red</s>USER: what ASSISTANT:",
    "a <s> and <unk> inside",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tokenizer.model"
    return TextTokenizer.train(TEXTS, path, vocab_size=420)


@pytest.fixture(scope="module")
def hf_tokenizer(tokenizer):
    transformers = pytest.importorskip("transformers")
    hf = transformers.LlamaTokenizer.from_pretrained(tokenizer.path.parent, add_bos_token=True)
    hf.add_tokens(["<image>"], special_tokens=True)
    return hf


@pytest.mark.parametrize("text", PROMPTS)
def test_ids_equal_llama_tokenizer(tokenizer, hf_tokenizer, text):
    assert [tokenizer.bos_id, *tokenizer.encode(text)] == hf_tokenizer(text).input_ids


def test_image_gets_the_first_free_id_when_the_model_has_none(tmp_path):
    import sentencepiece

    prefix = tmp_path / "bare"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        minloglevel=2,
    )
    bare = TextTokenizer(f"{prefix}.model")
    assert bare.image_id == 330
    assert bare.vocab_size == 331
    assert bare.encode("a<image>b").count(330) == 1
    assert bare.decode([*bare.encode("red"), 330, 999]) == "red"


def test_training_is_deterministic(tokenizer, tmp_path):
    again = TextTokenizer.train(TEXTS, tmp_path / "again.model", vocab_size=420)
    assert again.fingerprint == tokenizer.fingerprint


def test_decode_gives_the_text_back(tokenizer):
    for text in ("red", "is  there\na shape?", "\u00e9\u65e5"):
        assert tokenizer.decode([1, *tokenizer.encode(text), 2]) == text


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        TextTokenizer(tmp_path / "absent.model")
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        TextTokenizer(tmp_path / "bad.model")


DIALOGUE = [
    Turn("user", "What is this? <image>"),
    Turn("assistant", "a red circle"),
    Turn("user", "Is it big?"),
    Turn("assistant", "no"),
]


def text_of(segments, tokenizer):
    """What the ids stand for, special tokens included."""
    sp = tokenizer._backend._sp
    return "".join(sp.id_to_piece(i) for s in segments for i in s.ids).replace("\u2581", " ")


def test_vicuna_text_and_supervision(tokenizer):
    template = find_template("vicuna_v1", tokenizer)
    segments = render(DIALOGUE, template, tokenizer)
    assert text_of(segments, tokenizer) == (
        " A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nWhat is this? ASSISTANT: a red circle</s>"
        "USER: Is it big? ASSISTANT: no</s>"
    )
    said = [text_of([s], tokenizer) for s in segments if s.supervised]
    assert said == [" a red circle</s>", " no</s>"]


def test_plain_is_the_image_and_the_caption(tokenizer):
    segments = render(DIALOGUE[:2], find_template("plain", tokenizer), tokenizer)
    assert text_of(segments, tokenizer) == "<image>a red circle</s>"
    assert [s.supervised for s in segments] == [False, True]
    alone = render([Turn("assistant", "red")], find_template("plain", tokenizer), tokenizer)
    assert text_of(alone, tokenizer) == " red</s>"


@pytest.mark.parametrize("name", ["vicuna_v1", "vicuna_short", "plain", "mistral"])
@pytest.mark.parametrize("num_turns", [1, 2, 3])
def test_prompt_ids_equal_the_rendered_chat_template(tokenizer, hf_tokenizer, name, num_turns):
    turns, template = DIALOGUE[:num_turns], find_template(name, tokenizer)
    messages = [
        {"role": t.role, "content": [{"type": "text", "text": t.text.replace("<image>", "")}]}
        for t in turns
    ]
    messages[0]["content"].insert(0, {"type": "image"})
    asks = turns[-1].role == "user"
    text = hf_tokenizer.apply_chat_template(
        messages,
        chat_template=template.chat_template(with_begin=False),
        add_generation_prompt=asks,
        tokenize=False,
    )
    if asks:
        ours = list(prompt_ids(turns, template, tokenizer))
    else:
        ours = [tokenizer.bos_id, *(i for s in render(turns, template, tokenizer) for i in s.ids)]
    assert ours == hf_tokenizer(text).input_ids


def test_unknown_template_names_the_known_ones(tokenizer):
    with pytest.raises(ConfigError, match=r"'vicuna'.*plain, vicuna_short, vicuna_v1"):
        find_template("vicuna", tokenizer)
    with pytest.raises(ConfigError, match=r"needs the token '<\|im_start\|>', which"):
        find_template("chatml", tokenizer)
