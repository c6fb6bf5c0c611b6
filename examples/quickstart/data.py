"""The data of the quick start: easy-VQA as LLaVA JSON, and the texts made from it.

easy-VQA (PyPI `easy-vqa`, MIT) has 5,000 images of one coloured shape each and 48,248 questions,
with its own split into training and test. Three files of records come out of it:

    train.json  95 % of the training images; one record an image, its questions independent
    val.json    the other 5 %, never trained on; every choice of settings looks at these only
    test.json   the whole test split, untouched until the final evaluation

What else is trained on (`text.json` for the language model, `corpus.txt` for its tokenizer,
`facts.json` for the image encoder) is derived from the questions and answers of train.json alone:
test.json and val.json leave no trace in it, and no image's true label is read, only what its
training questions tell. `tests/unit/test_quickstart_data.py` holds that.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
HELD_OUT_PERCENT = 5  # of the training images, by hash of the name


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One image and all that is asked about it.

    Attributes:
        image: path below the images' folder, such as ``train/17.png``.
        questions: pairs of question and answer.
    """

    image: str
    questions: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the answers of one image tell about it; None or an absent word is unknown.

    Attributes:
        colour: the shape's colour.
        shape: its name.
        absent: colours and shapes that it is not.
    """

    colour: str | None
    shape: str | None
    absent: frozenset[str]


def read_split(split: str) -> list[Example]:
    """The examples of easy-VQA's ``train`` or ``test`` split, by image number."""
    import easy_vqa

    read = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]
    by_image: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in zip(*read(), strict=True):
        by_image.setdefault(image, []).append((question, answer))
    return [
        Example(image=f"{split}/{number}.png", questions=tuple(by_image[number]))
        for number in sorted(by_image)
    ]


def is_held_out(image: str) -> bool:
    """Whether a training image belongs to val.json: a pure function of its name."""
    digest = hashlib.sha256(image.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def record(example: Example) -> dict:
    """A LLaVA record: the image once, then its questions as independent conversations."""
    conversations = [
        [
            {"from": "human", "value": f"<image>\n{question}" if first else question},
            {"from": "gpt", "value": answer},
        ]
        for first, (question, answer) in _enumerate_first(example.questions)
    ]
    return {"id": example.image, "image": example.image, "conversations": conversations}


def facts_of(example: Example) -> Facts:
    """What the questions and answers of one image tell about it.

    A question may tell something itself ("what color is the circle?"), and a negated one
    ("is there not a circle?") tells the opposite of its answer.
    """
    present: set[str] = set()
    absent: set[str] = set()
    for question, answer in example.questions:
        words = question.rstrip("?").split()
        named = {w for w in words if w in COLOURS or w in SHAPES}
        if answer not in ("yes", "no"):
            present |= named | {answer}
        elif (answer == "yes") != ("not" in words or "no" in words):
            present |= named
        else:
            absent |= named
    colour, shape = _the_one(COLOURS, present, absent), _the_one(SHAPES, present, absent)
    for found, names in ((colour, COLOURS), (shape, SHAPES)):
        absent |= set(names) - {found} if found else set()
    return Facts(colour=colour, shape=shape, absent=frozenset(absent))


def caption(facts: Facts) -> str:
    """The facts in words: ``a blue circle``, or less where less is known."""
    words = [w for w in (facts.colour, facts.shape or "shape") if w]
    return f"a {' '.join(words)}"


def text_record(example: Example) -> dict:
    """A text-only record: the same questions, each after a caption instead of the image.

    The language model learns from these what the questions mean before it sees any image.
    """
    seen = caption(facts_of(example))
    conversations = [
        [{"from": "human", "value": f"{seen}\n{question}"}, {"from": "gpt", "value": answer}]
        for question, answer in example.questions
    ]
    return {"id": f"text/{example.image}", "conversations": conversations}


def corpus(examples: Iterable[Example]) -> list[str]:
    """Lines of text for the SentencePiece tokenizer: the words of the conversation template too."""
    lines = []
    for example in examples:
        lines.append(f"USER: {caption(facts_of(example))}")
        lines += [f"{question} ASSISTANT: {answer}" for question, answer in example.questions]
    return lines


def prepare(folder: Path, *, limit: int | None = None) -> dict[str, int]:
    """Write everything below ``folder``; returns how many records each file holds.

    Args:
        folder: gets images/, train.json, val.json, test.json, text.json, facts.json, corpus.txt,
            and val_facts.json, by which the encoder is measured.
        limit: images kept of each split, for a short run; None keeps all.
    """
    train, test = read_split("train"), read_split("test")
    kept = [e for e in train if not is_held_out(e.image)][:limit]
    held_out = [e for e in train if is_held_out(e.image)][:limit]
    test = test[:limit]
    _copy_images(folder / "images", [*kept, *held_out, *test])
    files = {
        "train.json": [record(e) for e in kept],
        "val.json": [record(e) for e in held_out],
        "test.json": [record(e) for e in test],
        "text.json": [text_record(e) for e in kept],
        "facts.json": [_facts_record(e) for e in kept],
        "val_facts.json": [_facts_record(e) for e in held_out],
    }
    for name, records in files.items():
        write_atomically(folder / name, json.dumps(records, indent=1))
    write_atomically(folder / "corpus.txt", "\n".join(corpus(kept)) + "\n")
    return {name: len(records) for name, records in files.items()}


def read_facts(path: Path) -> list[tuple[str, Facts]]:
    """Image paths with their facts, as ``prepare`` wrote them."""
    return [
        (
            r["image"],
            Facts(colour=r["colour"], shape=r["shape"], absent=frozenset(r["absent"])),
        )
        for r in json.loads(path.read_text(encoding="utf-8"))
    ]


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that an interruption leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _facts_record(example: Example) -> dict:
    facts = facts_of(example)
    return {
        "image": example.image,
        "colour": facts.colour,
        "shape": facts.shape,
        "absent": sorted(facts.absent),
    }


def _copy_images(folder: Path, examples: Sequence[Example]) -> None:
    import easy_vqa

    sources = {
        f"{split}/{number}.png": path
        for split, paths in (
            ("train", easy_vqa.get_train_image_paths()),
            ("test", easy_vqa.get_test_image_paths()),
        )
        for number, path in paths.items()
    }
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
    for example in examples:
        shutil.copyfile(sources[example.image], folder / example.image)


def _the_one(names: Sequence[str], present: set[str], absent: set[str]) -> str | None:
    found = [n for n in names if n in present] or [n for n in names if n not in absent]
    return found[0] if len(found) == 1 else None


def _enumerate_first(items: Sequence) -> Iterable[tuple[bool, object]]:
    return ((i == 0, item) for i, item in enumerate(items))
