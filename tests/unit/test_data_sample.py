"""Records are checked by name; rows have the right targets, positions, branches and images."""

import json

import numpy as np
import pytest

from megatron_asvr.batch import IGNORE
from megatron_asvr.config.schema import SourceConfig
from megatron_asvr.data.records import parse_record, read_records
from megatron_asvr.data.sample import SampleBuilder
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.errors import ConfigError, DataError
from tests.unit import hub_folders
from tests.unit.data_corpus import TEXTS, ask, config, turn

N = 4  # patches of one image in the small configuration


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("sample") / "tokenizer.model"
    return TextTokenizer.train(TEXTS, path, vocab_size=420)


def build(tokenizer, raw, tmp_path, *, branches=True, **changes):
    record = parse_record(raw, where="x.json: record 0", folder=tmp_path)
    return SampleBuilder(config(**changes), tokenizer, branches=branches).build(record)


QUESTIONS = [("What color is it?", "red"), ("Is there a circle?", "no"), ("Shape?", "a triangle")]


def shared_record(images=("a.png",)):
    return {
        "id": "s",
        "image": list(images),
        "conversations": [ask(q, a) for q, a in QUESTIONS],
    }


def single_record(question, answer, images=("a.png",)):
    front = "<image>\n" * len(images)
    return {"id": "q", "image": list(images), "conversations": ask(front + question, answer)}


def test_targets_are_the_next_answer_token_and_the_end(tokenizer, tmp_path):
    sample = build(tokenizer, single_record("What color?", "red"), tmp_path)
    (row,) = sample.rows
    supervised = row.targets_S != IGNORE
    assert tokenizer.decode(row.targets_S[supervised]) == "red"
    assert row.targets_S[supervised][-1] == tokenizer.eos_id
    np.testing.assert_array_equal(
        row.targets_S[:-1][supervised[:-1]], row.tokens_S[1:][supervised[:-1]]
    )
    assert row.targets_S[-1] == IGNORE
    assert row.tokens_S[0] == tokenizer.bos_id
    (start,) = row.image_starts
    assert (row.tokens_S[start : start + N] == tokenizer.image_id).all()
    assert (row.tokens_S == tokenizer.image_id).sum() == N


@pytest.mark.parametrize("images", [(), ("a.png",), ("a.png", "b.png")])
@pytest.mark.parametrize("template", ["vicuna_short", "vicuna_v1"])
def test_a_branch_equals_its_question_asked_alone(tokenizer, tmp_path, images, template):
    changes = {"data__template": template}
    raw = shared_record(images=images)
    (row,) = build(tokenizer, raw, tmp_path, **changes).rows
    shared = int((row.branch_S == 0).sum())
    assert row.targets_S[shared - 1] == IGNORE
    for number, (question, answer) in enumerate(QUESTIONS, start=1):
        alone = single_record(question, answer, images)
        (single,) = build(tokenizer, alone, tmp_path, **changes).rows
        seen = (row.branch_S == 0) | (row.branch_S == number)
        for name in ("tokens_S", "targets_S", "positions_S"):
            np.testing.assert_array_equal(getattr(row, name)[seen], getattr(single, name))
        assert row.image_starts == single.image_starts


def test_repeated_images_count_once_and_teach_the_same(tokenizer, tmp_path):
    raw = shared_record()
    branched = build(tokenizer, raw, tmp_path)
    repeated = build(tokenizer, raw, tmp_path, branches=False)
    assert [row.counts_images for row in repeated.rows] == [True, False, False]
    for row, (question, answer) in zip(repeated.rows, QUESTIONS, strict=True):
        (single,) = build(tokenizer, single_record(question, answer), tmp_path).rows
        np.testing.assert_array_equal(row.tokens_S, single.tokens_S)
    targets = np.concatenate([row.targets_S for row in repeated.rows])
    np.testing.assert_array_equal(
        targets[targets != IGNORE], branched.rows[0].targets_S[branched.rows[0].targets_S != IGNORE]
    )


@pytest.fixture(scope="module")
def unbegun(tmp_path_factory):
    """A tokenizer that puts no token before a text, as Qwen's."""
    return TextTokenizer(hub_folders.write("qwen2", tmp_path_factory.mktemp("qwen") / "text"))


@pytest.mark.parametrize("images", [(), ("a.png",), ("a.png", "b.png")])
@pytest.mark.parametrize("template", ["chatml", "tokenizer"])
def test_branches_without_a_begin_token(unbegun, tmp_path, images, template):
    changes = {"data__template": template, "model__language__vocab_size": 600}
    sample = build(unbegun, shared_record(images=images), tmp_path, **changes)
    (row,) = sample.rows
    assert (row.branch_S == 0).any() == bool(images)
    for number, (question, answer) in enumerate(QUESTIONS, start=1):
        alone = build(unbegun, single_record(question, answer, images), tmp_path, **changes)
        (single,) = alone.rows
        assert alone.lost_targets == sample.lost_targets == 0
        seen = (row.branch_S == 0) | (row.branch_S == number)
        for name in ("tokens_S", "targets_S", "positions_S"):
            np.testing.assert_array_equal(getattr(row, name)[seen], getattr(single, name))
        said = single.targets_S[single.targets_S != IGNORE]
        assert unbegun.decode(said) == answer
        assert said[-1] == unbegun.special_id("<|im_end|>")


def test_a_first_word_that_nothing_precedes_is_counted(unbegun, tmp_path):
    changes = {"data__template": "plain", "model__language__vocab_size": 600}
    text = {"conversations": [turn("gpt", "red")]}
    sample = build(unbegun, text, tmp_path, **changes)
    assert sample.lost_targets == 1
    assert (sample.rows[0].targets_S != IGNORE).sum() == sample.rows[0].length - 1
    several = {"conversations": [[turn("gpt", "red")], [turn("gpt", "no")]]}
    assert build(unbegun, several, tmp_path, **changes).lost_targets == 2
    image = {"image": "a.png", "conversations": [turn("human", "<image>"), turn("gpt", "red")]}
    sample = build(unbegun, image, tmp_path, **changes)
    assert sample.rows[0].image_starts == (0,)
    assert sample.lost_targets == 0


def test_captions_that_share_an_image_lose_their_first_word_counted(tokenizer, tmp_path):
    raw = {"image": "a.png", "conversations": [[turn("human", ""), turn("gpt", "red")]] * 2}
    assert build(tokenizer, raw, tmp_path, data__template="plain").lost_targets == 2


def test_image_without_caption_and_text_without_image(tokenizer, tmp_path):
    bare = {"image": "a.png", "conversations": [turn("human", "<image>")]}
    (row,) = build(tokenizer, bare, tmp_path, data__template="plain").rows
    assert row.tokens_S.tolist() == [tokenizer.bos_id] + [tokenizer.image_id] * N
    assert (row.targets_S == IGNORE).all()
    (row,) = build(tokenizer, {"conversations": ask("hi", "red")}, tmp_path).rows
    assert row.image_starts == ()


def test_overlong_text_is_cut_or_dropped_but_never_an_image(tokenizer, tmp_path):
    raw = single_record("What color?", "red " * 50)
    whole = build(tokenizer, raw, tmp_path).rows[0]
    cut = build(tokenizer, raw, tmp_path, data__max_length=40)
    assert cut.rows[0].length == 40
    assert cut.cut_tokens == whole.length - 40
    assert cut.rows[0].targets_S[-1] == IGNORE
    np.testing.assert_array_equal(cut.rows[0].targets_S[:39], whole.targets_S[:39])
    images_end = whole.image_starts[0] + N
    assert build(tokenizer, raw, tmp_path, data__max_length=images_end).rows
    inside = build(tokenizer, raw, tmp_path, data__max_length=images_end - 1)
    assert not inside.rows
    assert inside.dropped_rows == 1
    assert inside.dropped_tokens == whole.length - N
    assert cut.dropped_tokens == inside.cut_tokens == 0
    dropped = build(tokenizer, raw, tmp_path, data__max_length=40, data__on_overlong="drop")
    assert not dropped.rows
    question_only = build(
        tokenizer, {"conversations": ask("What " * 30, "red")}, tmp_path, data__max_length=20
    )
    assert not question_only.rows


def test_official_mode_cuts_inside_an_image(tokenizer, tmp_path):
    raw = single_record("What color?", "red")
    (row,) = build(tokenizer, raw, tmp_path, loss__mode="official", data__max_length=6).rows
    assert row.length == 6
    assert row.image_starts[0] + N > 6


def test_tokenizer_larger_than_the_model_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="vocab_size=64 is smaller"):
        SampleBuilder(config(model__language__vocab_size=64), tokenizer, branches=True)


BAD = {
    "a list": ([], "is of type list|is an empty list"),
    "no conversations": ({"id": "r"}, r"\(id 'r'\): 'conversations' is missing"),
    "value": ({"conversations": [turn("human", 3)]}, r"conversations\[0\]: 'value' is of type int"),
    "speaker": ({"conversations": [turn("bot", "x")]}, "'from' is 'bot'; use 'human' or 'gpt'"),
    "image type": ({"image": 5, "conversations": ask("a", "b")}, "'image' is of type int"),
    "too few": ({"image": "a.png", "conversations": ask("a", "b")}, "0 <image> .* but 1"),
    "too many": ({"conversations": ask("<image>a", "b")}, "1 <image> .* but 0"),
    "in the answer": ({"conversations": ask("a", "<image>")}, "in an answer"),
    "nothing": ({"conversations": [turn("human", "a")]}, "neither an image nor an answer"),
    "two humans": ({"conversations": [turn("human", "a")] * 2}, "two turns in a row"),
    "branch count": (
        {"image": "a.png", "conversations": [ask("<image><image>a", "b"), ask("a", "b")]},
        "2 <image> .* but 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_records_name_file_record_and_key(tmp_path, case):
    raw, message = BAD[case]
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"conversations": ask("a", "b")}, raw]))
    with pytest.raises(DataError, match=f"(?s)1 records .*train.json: record 1.*({message})"):
        read_records([SourceConfig(path=str(path))])


def test_wrong_files_are_named(tmp_path):
    for name, content, message in (
        ("absent.json", None, "cannot be read"),
        ("text.json", "{", "is not JSON"),
        ("object.json", "{}", "wanted a list of records"),
        ("empty.json", "[]", "no records"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        with pytest.raises(DataError, match=f"{name}.*{message}"):
            read_records([SourceConfig(path=str(path))])


def test_many_problems_are_listed_and_counted(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{}] * 9))
    with pytest.raises(DataError, match=r"(?s)9 records.*record 0.*record 4.*and 4 more") as error:
        read_records([SourceConfig(path=str(path))])
    assert "record 5" not in str(error.value)


def test_image_folder_and_ids(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"image": "a/b.png", "conversations": ask("<image>", "x")}]))
    (here,) = read_records([SourceConfig(path=str(path))])
    (there,) = read_records([SourceConfig(path=str(path), images="/data")])
    assert here.images == (str(tmp_path / "a/b.png"),)
    assert there.images == ("/data/a/b.png",)
    assert here.id == f"{path}: record 0"
