import json

import pytest

from examples.quickstart import data
from examples.quickstart.data import Example, caption, facts_of, is_held_out, record
from megatron_asvr.data.records import parse_record


def example(*questions):
    return Example(image="train/7.png", questions=questions)


@pytest.mark.parametrize(
    ("question", "answer", "colour", "shape", "absent"),
    [
        ("what color is the circle?", "blue", "blue", "circle", "red rectangle"),
        ("what is the blue shape?", "circle", "blue", "circle", "triangle"),
        ("what shape is present?", "triangle", None, "triangle", "circle rectangle"),
        ("is there a red shape?", "yes", "red", None, "blue teal"),
        ("is there a red shape?", "no", None, None, "red"),
        ("is there not a red shape?", "no", "red", None, "blue"),
        ("is there not a red shape?", "yes", None, None, "red"),
        ("is no circle present?", "no", None, "circle", "rectangle"),
        ("is no circle present?", "yes", None, None, "circle"),
    ],
)
def test_what_one_answer_tells(question, answer, colour, shape, absent):
    facts = facts_of(example((question, answer)))
    assert (facts.colour, facts.shape) == (colour, shape)
    assert facts.absent >= set(absent.split())
    assert not facts.absent & {colour, shape}


def test_what_is_left_after_exclusion_is_known():
    facts = facts_of(example(("is there a circle?", "no"), ("is a triangle present?", "no")))
    assert (facts.shape, facts.colour) == ("rectangle", None)


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        ([("what color is the circle?", "blue")], "a blue circle"),
        ([("what color is the shape?", "blue")], "a blue shape"),
        ([("what shape is present?", "circle")], "a circle"),
        ([("is there a circle?", "no")], "a shape"),
    ],
)
def test_caption_says_what_is_known_and_no_more(questions, words):
    assert caption(facts_of(example(*questions))) == words


def test_held_out_part_is_five_percent_and_stays_the_same():
    held_out = [n for n in range(4000) if is_held_out(f"train/{n}.png")]
    assert len(held_out) == 210
    assert held_out[:3] == [5, 14, 43]


def test_records_are_questions_that_share_an_image(tmp_path):
    raw = record(example(("is there a circle?", "no"), ("what color is the shape?", "blue")))
    parsed = parse_record(raw, where="here", folder=tmp_path)
    assert parsed.images == (str(tmp_path / "train/7.png"),)
    assert [[t.text for t in c] for c in parsed.conversations] == [
        ["<image>\nis there a circle?", "no"],
        ["<image>\nwhat color is the shape?", "blue"],
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return folder, data.prepare(folder, limit=30)


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_the_test_split_is_whole_and_untouched():
    test = data.read_split("test")
    assert (len(test), sum(len(e.questions) for e in test)) == (1000, 9673)
    assert all(e.image.startswith("test/") for e in test)


def test_parts_share_no_image(prepared):
    folder, counts = prepared
    names = [{r["image"] for r in read(folder, f"{p}.json")} for p in ("train", "val", "test")]
    assert [len(part) for part in names] == [30, 30, 30]
    assert len(set.union(*names)) == 90
    assert all(is_held_out(name) for name in names[1])
    assert not any(is_held_out(name) for name in names[0])
    assert all((folder / "images" / name).is_file() for part in names for name in part)
    assert counts["test.json"] == 30


def test_derived_texts_come_from_training_questions_alone(prepared):
    folder, _ = prepared
    train = read(folder, "train.json")
    names = {r["image"] for r in train}
    asked = {(r["image"], c[0]["value"].removeprefix("<image>\n"), c[1]["value"])
             for r in train for c in r["conversations"]}  # fmt: skip
    texts = read(folder, "text.json")
    told = {(r["id"].removeprefix("text/"), c[0]["value"].split("\n")[1], c[1]["value"])
            for r in texts for c in r["conversations"]}  # fmt: skip
    assert told == asked
    assert "image" not in texts[0]
    assert {name for name, _ in data.read_facts(folder / "facts.json")} == names
    lines = (folder / "corpus.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(train) + sum(len(r["conversations"]) for r in train)


def test_facts_read_back_equal(prepared):
    folder, _ = prepared
    by_name = {e.image: facts_of(e) for e in data.read_split("train")}
    assert all(by_name[name] == facts for name, facts in data.read_facts(folder / "facts.json"))
