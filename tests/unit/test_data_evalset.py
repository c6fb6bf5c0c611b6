"""Every answered question becomes one item that is asked alone."""

import json

import pytest

from megatron_asvr.config.schema import SourceConfig
from megatron_asvr.data.evalset import read_questions
from megatron_asvr.errors import DataError
from megatron_asvr.train.evaluate import Questions, read_items
from tests.unit.data_corpus import ask, turn


def read(tmp_path, records):
    path = tmp_path / "test.json"
    path.write_text(json.dumps(records))
    return read_questions([SourceConfig(path=str(path), images="/img")])


def test_independent_conversations_do_not_see_one_another(tmp_path):
    record = {
        "id": "s",
        "image": "a.png",
        "conversations": [ask("What color?", "red"), ask("Shape?", "circle")],
    }
    first, second = read(tmp_path, [record])
    assert (first.id, second.id) == ("s#0", "s#1")
    assert [t.text for t in second.turns] == ["<image>\nShape?"]
    assert (second.question, second.reference) == ("Shape?", "circle")
    assert second.images == ("/img/a.png",)


def test_later_turns_carry_the_dialogue_and_only_images_shown_so_far(tmp_path):
    turns = [*ask("<image>What color?", "red"), *ask("And here? <image>", "blue")]
    record = {"id": "s", "image": ["a.png", "b.png"], "conversations": turns}
    first, second = read(tmp_path, [record])
    assert first.images == ("/img/a.png",)
    assert second.images == ("/img/a.png", "/img/b.png")
    assert [t.role for t in second.turns] == ["user", "assistant", "user"]
    assert second.question == "And here?"


def test_nothing_asked_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no question with an answer"):
        read(tmp_path, [{"image": "a.png", "conversations": [turn("human", "<image>")]}])
    (item,) = read(tmp_path, [{"id": 7, "conversations": ask("hi", "red")}])
    assert (item.id, item.images) == ("7", ())


def test_a_limit_counts_what_is_compared(tmp_path):
    """The proof of an export takes first questions; later ones do not use up its limit."""
    turns = [*ask("A?", "1"), *ask("B?", "2"), *ask("C?", "3")]
    read(tmp_path, [{"id": i, "conversations": turns} for i in range(4)])
    questions = Questions(source=SourceConfig(path=str(tmp_path / "test.json")), limit=3)
    assert [item.id for item in read_items(questions)] == ["0#0", "1#1", "2#2"]
    assert [item.id for item in read_items(questions, first_only=True)] == ["0#0", "1#0", "2#0"]
