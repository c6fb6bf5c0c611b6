"""Folders with a tokenizer.json: the ids of transformers, and conversations in any template."""

import json

import pytest
import transformers

from megatron_asvr.config.schema import TEMPLATES as KNOWN
from megatron_asvr.data.conversation import Turn, prompt_ids, prompt_text, render
from megatron_asvr.data.templates import TEMPLATES, find_template
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.errors import ConfigError, DataError
from tests.unit import hub_folders

TEXTS = [
    "",
    "Hello, world! It's 3.14159 and 1,234,567.",
    "a  b   c      d\t\te",
    "line one\nline two\r\n\r\n\n   line four  \n",
    "  two leading spaces and trailing ones   ",
    "caf\u00e9 cafe\u0301 \ufb01 \u00bd \u65e5\u672c\u8a9e \u0915\u094d\u0937 \U0001f469\u200d",
    "<image>\nWhat is <image> this?<image>",
    "<|im_start|>user\nhi<|im_end|> <|eot_id|> </s> <s> x",
    "don't WE'LL they've",
]
CASES = [
    ("llama3", "llama3"),
    ("llama3", "tokenizer"),
    ("llama3", "vicuna_v1"),
    ("llama3", "plain"),
    ("qwen2", "chatml"),
    ("qwen2", "tokenizer"),
    ("qwen2", "mistral"),
    ("smollm2", "tokenizer"),
    ("marked", "vicuna_v1"),
    ("marked", "mistral"),
]
DIALOGUE = [
    Turn("user", "What is this? <image>"),
    Turn("assistant", "a red (small) circle"),
    Turn("user", "Is it big?"),
    Turn("assistant", "42, no"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    return {name: hub_folders.write(name, root / name) for name in hub_folders.FAMILIES}


@pytest.fixture(scope="module")
def stock(folders):
    """What transformers makes of the folders, with the image token added."""
    found = {k: transformers.AutoTokenizer.from_pretrained(v) for k, v in folders.items()}
    # transformers 5 makes a GPT2Tokenizer of its own, without what the file says of digits.
    plain = transformers.PreTrainedTokenizerFast
    found["smollm2"] = plain.from_pretrained(folders["smollm2"])
    for tokenizer in found.values():
        tokenizer.add_tokens(["<image>"], special_tokens=True)
    return found


@pytest.mark.parametrize("family", hub_folders.FAMILIES)
def test_ids_equal_auto_tokenizer(family, folders, stock):
    ours, theirs = TextTokenizer(folders[family]), stock[family]
    for text in (*TEXTS, *hub_folders.texts()):
        ids = theirs(text).input_ids
        assert [*ours.begin, *ours.encode(text)] == ids, text
        answer = theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == answer.removeprefix(" ")
    assert ours.vocab_size == len(theirs)
    assert ours.image_id == theirs.convert_tokens_to_ids("<image>") == ours.vocab_size - 1
    assert ours.eos_id == theirs.eos_token_id
    assert ours.begin == (() if family in ("qwen2", "smollm2") else (theirs.bos_token_id,))
    assert not ours.has_image


@pytest.mark.parametrize("family", hub_folders.FAMILIES)
def test_a_text_can_be_encoded_in_parts(family, folders):
    ours = TextTokenizer(folders[family] / "tokenizer.json")
    whole = ours.encode("USER: hello ASSISTANT: a red circle")
    assert whole == [
        *ours.encode("USER: hello ASSISTANT:"),
        *ours.encode(" a red circle", at_start=False),
    ]
    assert ours.encode("x", at_start=False) == ours.encode("<image>x")[1:]


def test_settings_beside_the_file_count(tmp_path):
    folder = hub_folders.write("qwen2", tmp_path / "a")
    plain = TextTokenizer(folder)
    added = hub_folders.write("qwen2", tmp_path / "b", pad_token="[PAD]", eos_token="<|im_end|>")
    ours, theirs = TextTokenizer(added), transformers.AutoTokenizer.from_pretrained(added)
    assert ours.pad_id == theirs.pad_token_id == plain.image_id
    assert ours.image_id == len(theirs)
    assert ours.fingerprint != plain.fingerprint
    (added / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        TextTokenizer(added)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token": None}, "names no eos_token"),
        ({"added_tokens_decoder": {"3": {"content": "<|im_end|>"}}}, "gives '<.im_end.>' the id 3"),
    ],
)
def test_what_cannot_work_is_refused(settings, message, tmp_path):
    with pytest.raises(DataError, match=message):
        TextTokenizer(hub_folders.write("qwen2", tmp_path, **settings))


def test_a_tokenizer_that_ends_texts_is_refused(tmp_path):
    path = hub_folders.write("llama3", tmp_path) / "tokenizer.json"
    tree = json.loads(path.read_text())
    token = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    tree["post_processor"]["single"].append(token)
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match="more around a text than one begin token"):
        TextTokenizer(tmp_path)


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"holds neither tokenizer\.model nor"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="holds a list; wanted an object"):
        TextTokenizer(tmp_path)


def test_the_schema_lists_the_templates():
    assert set(KNOWN) == set(TEMPLATES)


@pytest.mark.parametrize(("family", "name"), CASES)
@pytest.mark.parametrize("num_turns", [1, 2, 3, 4])
def test_ids_equal_apply_chat_template(family, name, num_turns, folders, stock):
    ours, theirs = TextTokenizer(folders[family]), stock[family]
    template = find_template(name, ours)
    turns, asks = DIALOGUE[:num_turns], num_turns % 2 == 1
    messages = [{"role": t.role, "content": t.text} for t in turns]
    messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    text = theirs.apply_chat_template(
        messages,
        chat_template=template.chat_template(with_begin=False),
        add_generation_prompt=asks,
        tokenize=False,
    )
    segments = render(turns, template, ours)
    ids = [*ours.begin, *(i for s in segments for i in s.ids)]
    if asks:
        ids = list(prompt_ids(turns, template, ours))
        assert prompt_text(turns, template) == text
    assert theirs(text).input_ids == ids
    said = [s.ids for s in segments if s.supervised]
    answers = [t.text for t in turns if t.role == "assistant"]
    assert "".join(map(ours.decode, said)) == "".join(answers)
    assert all(i[-1] == template.end_id for i in said)
    # The language model alone sees no images; its tokenizer adds no begin token to a conversation.
    alone = [Turn(t.role, t.text.replace("<image>", "").strip()) for t in turns]
    segments = render(alone, template, ours)
    assert theirs.apply_chat_template(
        [{"role": t.role, "content": t.text} for t in alone],
        chat_template=template.chat_template(with_begin=True),
        return_dict=False,
    ) == [*ours.begin, *(i for s in segments for i in s.ids)]


@pytest.mark.parametrize("family", ["llama3", "qwen2", "smollm2"])
def test_a_folders_own_template_is_kept_for_the_language_model(family, folders, stock):
    template = find_template("tokenizer", TextTokenizer(folders[family]))
    assert template.chat_template(with_begin=True) == stock[family].chat_template
    texts = []
    for name in ("tokenizer", "llama3" if family == "llama3" else "chatml"):
        found = find_template(name, TextTokenizer(folders[family]))
        texts.append(prompt_text(DIALOGUE[:3], found))
    assert texts[0] == texts[1]


def test_several_images_stay_in_place(folders, stock):
    template = find_template("chatml", TextTokenizer(folders["qwen2"]))
    parts = [{"type": "text", "text": "Compare "}, {"type": "image"}]
    parts += [{"type": "text", "text": " and "}, {"type": "image"}]
    asked = [Turn("user", "Compare <image> and <image>")]
    for content in (parts, asked[0].text):
        text = stock["qwen2"].apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=template.chat_template(with_begin=False),
            add_generation_prompt=True,
            tokenize=False,
        )
        assert text == prompt_text(asked, template)
    assert "Compare <image> and <image><|im_end|>" in text


REFUSED = {
    "strips old answers": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'user' or "
        "loop.last %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}",
        "rewrites earlier turns",
    ),
    "date": ("{{ strftime_now('%d') }}" + hub_folders.QWEN2, "today's date"),
    "no end": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        "could not learn to stop",
    ),
    "syntax": ("{% for m in messages %}", "is no Jinja template"),
    "no images": (
        "{% for m in messages %}{{ m['role'] }}{% for p in m['content'] %}{{ p['text'] }}"
        "{% endfor %}<|im_end|>{% endfor %}",
        "loses <image>",
    ),
    "raises": ("{{ raise_exception('never') }}", "refuses a conversation of user.*never"),
    "escapes": ("{{ messages.__class__.__mro__ }}", "refuses a conversation"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_templates_that_cannot_work_are_refused(case, folders, tmp_path):
    source, message = REFUSED[case]
    path = tmp_path / "own.jinja"
    path.write_text(source)
    with pytest.raises(ConfigError, match=message):
        find_template(str(path), TextTokenizer(folders["qwen2"]))


def test_a_template_of_parts_gets_parts(folders, tmp_path):
    path = tmp_path / "parts.jinja"
    path.write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
        "{% generation %}{% endgeneration %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = find_template(str(path), TextTokenizer(folders["qwen2"]))
    text = prompt_text(DIALOGUE[:1], template)
    assert text == "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    assert template.chat_template(with_begin=False) == path.read_text()


def test_a_missing_template_is_named(folders, tmp_path):
    with pytest.raises(ConfigError, match="there is no chat template beside"):
        find_template("tokenizer", TextTokenizer(folders["marked"]))
    with pytest.raises(ConfigError, match="cannot be read"):
        find_template("absent.jinja", TextTokenizer(folders["marked"]))
    several = [{"name": "tools", "template": "x"}, {"name": "default", "template": "{{ 1 }}"}]
    folder = hub_folders.write("marked", tmp_path, chat_template=several)
    with pytest.raises(ConfigError, match=r"could not learn|loses"):
        find_template("tokenizer", TextTokenizer(folder))
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == several
