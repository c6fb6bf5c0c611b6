"""Tiny benchmarks in the schemas of the data sets that lmms-eval's tasks load, with drawn images.

Each has an answer for every row that its rule must find right, and one that it must find wrong.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import yaml
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "white")
MODES = ("RGB", "L", "RGBA", "RGB")  # some of the real images are grey or have an alpha channel
PERCEPTION = "existence", "count"
YES_NO = ("Yes", "No")


@dataclass(frozen=True)
class Fixture:
    """The rows of a benchmark.

    Attributes:
        folder: of the benchmark.
        split: of the rows.
        rows: in the schema of the data set.
        right: an answer to each row that scores fully.
        wrong: one that scores nothing.
        config: configuration on the hub; None where there is only one.
        images: columns that hold an image, or a list of them.
        more: rows of another configuration of the same data set.
    """

    folder: str
    split: str
    rows: list[dict[str, Any]]
    right: list[str]
    wrong: list[str]
    config: str | None = None
    images: tuple[str, ...] = ("image",)
    more: tuple[str, list[dict[str, Any]]] | None = None


def picture(number: int) -> Image.Image:
    """A circle; size, colour and mode depend on the number."""
    size = (40 + 7 * (number % 5), 40 + 5 * (number % 3))
    image = Image.new("RGB", size, "black")
    corner = min(size) - 8
    ImageDraw.Draw(image).ellipse((6, 6, corner, corner), fill=COLOURS[number % 4])
    return image.convert(MODES[number % 4])


def fixtures() -> Iterator[Fixture]:
    """All 14."""
    yield from (textvqa(), docvqa(), ocrbench(), chartqa(), mmbench(), mme(), seedbench(), gqa())
    yield from (mmmu(), ai2d(), realworldqa(), mmvp(), hallusion_bench(), pope())


def textvqa() -> Fixture:
    rows = [
        {
            "image_id": f"i{i}",
            "question_id": 100 + i,
            "question": "what is the brand of this camera?",
            "question_tokens": ["what", "is"],
            "image": picture(i),
            "image_width": 40,
            "image_height": 40,
            "flickr_original_url": "",
            "flickr_300k_url": "",
            "answers": ["Nous Les Gosses."] * 9 + ["dakota"],
            "image_classes": ["Camera"],
            "set_name": "val",
            "ocr_tokens": ["DAKOTA"],
        }
        for i in range(3)
    ]
    # Ten people answered, so nine who agree are all that can be: 9/10 + 1/10 = 1.
    return Fixture("textvqa", "validation", rows, ["nous les gosses"] * 3, ["unknown"] * 3)


def docvqa() -> Fixture:
    rows = [
        {
            "questionId": str(i),
            "question": "What is the date?",
            "question_types": ["handwritten"],
            "image": picture(i),
            "docId": i,
            "ucsf_document_id": "x",
            "ucsf_document_page_no": "1",
            "answers": ["1/8/93", "January 8, 1993"],
            "data_split": "val",
        }
        for i in range(3)
    ]
    right = ["1/8/93", "january 8,  1993", "January 8, 1993"]
    return Fixture("docvqa", "validation", rows, right, ["none"] * 3, config="DocVQA")


def ocrbench() -> Fixture:
    kinds = [
        ("IIIT5K", "Regular Text Recognition", ["CENTRE"], "it says Centre."),
        ("HME100k", "Handwritten Mathematical Expression Recognition", ["x ^ 2"], "x^2"),
        ("docVQA", "Doc-oriented VQA", ["12", "twelve"], "Twelve"),
    ]
    rows = [
        {"dataset": name, "question": "what?", "question_type": kind, "answer": answer}
        | {"image": picture(i)}
        for i, (name, kind, answer, _) in enumerate(kinds)
    ]
    return Fixture("ocrbench", "test", rows, [kind[3] for kind in kinds], ["nothing"] * 3)


def chartqa() -> Fixture:
    known = [
        ("human_test", "14", "14.5"),
        ("augmented_test", "Yes", "yes"),
        ("human_test", "62%", "62%"),
    ]
    rows = [
        {"type": kind, "question": "How many bars?", "answer": answer, "image": picture(i)}
        for i, (kind, answer, _) in enumerate(known)
    ]
    return Fixture("chartqa", "test", rows, [x[2] for x in known], ["15.5", "no", "50%"])


def mmbench() -> Fixture:
    rows = [
        {
            "index": 240 + i,
            "question": "Which colour has the circle?",
            "hint": "nan" if i else "Look at the middle.",
            "answer": "ABCD"[i],
            **dict(zip("ABCD", COLOURS, strict=True)),
            "category": "attribute_recognition",
            "image": picture(i),
            "source": "drawn",
            "L2-category": "finegrained_perception",
            "comment": "nan",
            "split": "dev",
        }
        for i in range(4)
    ]
    right = ["A", "B. green", "the answer is (C).", "white"]
    return Fixture("mmbench", "dev", rows, right, ["B", "C", "D", "A"], config="en")


def mme() -> Fixture:
    rows = [
        {
            "question_id": f"{category}/{number}.jpg",
            "image": picture(number),
            "question": f"Is there a circle in this image? {answer} Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        # Cognition comes first there too; it does not count in the score of perception.
        for category in ("code_reasoning", *PERCEPTION)
        for number in range(2)
        for answer in YES_NO
    ]
    right = [YES_NO[i % 2] + ("." if i == 4 else "") for i in range(len(rows))]
    return Fixture("mme", "test", rows, right, [YES_NO[1 - i % 2] for i in range(len(rows))])


def seedbench() -> Fixture:
    kinds = ("image", "video", "image")
    rows = [
        {
            "image": [picture(i + j) for j in range(1 if kind == "image" else 8)],
            "question_id": str(i),
            "question": "Which colour?",
            **{f"choice_{letter}": x for letter, x in zip("abcd", COLOURS, strict=True)},
            "answer": "ABC"[i],
            "data_id": str(i),
            "data_type": kind,
            "question_type_id": i,
            "segment": [],
        }
        for i, kind in enumerate(kinds)
    ]
    return Fixture("seedbench", "test", rows, ["A", "B", "C. blue"], ["D"] * 3)


def gqa() -> Fixture:
    rows = [
        {
            "id": f"q{i}",
            "imageId": f"n{i % 2}",
            "question": "Is it overcast?",
            "isBalanced": True,
            "answer": ("no", "yes", "the left")[i],
            "fullAnswer": "No, it is clear.",
            "semanticStr": "",
        }
        for i in range(3)
    ]
    pictures = [{"id": f"n{i}", "image": picture(i)} for i in (1, 0)]
    more = ("testdev_balanced_images", pictures)
    right = ["No", "yes.", "The left"]
    config = "testdev_balanced_instructions"
    return Fixture("gqa", "testdev", rows, right, ["maybe"] * 3, config, (), more)


def mmmu() -> Fixture:
    asked = [
        ("<image 1> Which colour?", str(list(COLOURS)), "C", "multiple-choice", "(C)", "A"),
        ("What in <image 1> and <image 2>?", "['a circle', 'a square']", "A", "multiple-choice",
         "A. a circle", "B"),
        ("How many in <image 1>?", "[]", "3", "open", "There are 3.", "17"),
    ]  # fmt: skip
    rows = [
        {
            "id": f"validation_Art_{i + 1}",
            "question": question,
            "options": options,
            "explanation": "",
            **{f"image_{j}": picture(i + j) if j <= 1 + (i == 1) else None for j in range(1, 8)},
            "img_type": "['Paintings']",
            "answer": answer,
            "topic_difficulty": "Easy",
            "question_type": kind,
            "subfield": "Drawing",
        }
        for i, (question, options, answer, kind, _, _) in enumerate(asked)
    ]
    images = tuple(f"image_{j}" for j in range(1, 8))
    right, wrong = [x[4] for x in asked], [x[5] for x in asked]
    return Fixture("mmmu", "validation", rows, right, wrong, images=images)


def ai2d() -> Fixture:
    rows = [
        {"question": "Which?", "options": list(COLOURS), "answer": str(i), "image": picture(i)}
        for i in range(3)
    ]
    return Fixture("ai2d", "test", rows, ["A", "B. green", "c"], ["B", "C. blue", "D"])


def realworldqa() -> Fixture:
    letter = "Please answer directly with only the letter of the correct option and nothing else."
    asked = [
        (f"Which?\nA. Left\nB. Right\n{letter}", "B", "B. Right", "A"),
        ("How many? Please answer directly with a single word or number.", "3", "3.", "4"),
        (f"Where?\nA. Left\nB. Right\nC. Up\n{letter}", "A", "(A)", "C"),
    ]
    rows = [
        {"image_path": f"{i}.webp", "image": picture(i), "question": x[0], "answer": x[1]}
        for i, x in enumerate(asked)
    ]
    return Fixture("realworldqa", "test", rows, [x[2] for x in asked], [x[3] for x in asked])


def mmvp() -> Fixture:
    rows = [
        {
            "Index": i + 1,
            "Question": "Is the circle on the left or on the right?",
            "Options": "(a) Left (b) Right",
            "Correct Answer": "(a)" if i % 2 == 0 else "(b)",
            "image": picture(i),
        }
        for i in range(4)
    ]
    return Fixture("mmvp", "train", rows, ["A", "(b)", "A. Left", "B"], ["B", "B", "B", "B"])


def hallusion_bench() -> Fixture:
    rows = [
        {
            "category": "VD",
            "subcategory": "illusion",
            "visual_input": "1",
            "set_id": "0",
            "figure_id": str(i // 2),
            "sample_note": "circle",
            "question_id": str(i % 2),
            "question": "Is the left circle larger?",
            "gt_answer_details": "Both are equal.",
            "gt_answer": str(i % 2),
            "filename": f"./{i}.png",
            "image": picture(i),
        }
        for i in range(4)
    ]
    right = ["No, it is not.", "Yes, it is."] * 2
    return Fixture("hallusion_bench", "image", rows, right, right[1:] + right[:1])


def pope() -> Fixture:
    rows = [
        {
            "id": str(i),
            "question_id": str(i),
            "question": "Is there a snowboard in the image?",
            "answer": YES_NO[i % 2].lower(),
            "image_source": "drawn",
            "image": picture(i),
            "category": "adversarial",
        }
        for i in range(4)
    ]
    return Fixture("pope", "test", rows, ["Yes", "no", "yes", "No"], ["no", "yes", "no", "yes"])


def write(fixture: Fixture, data: Path) -> None:
    """Write a benchmark below ``data`` as a mirror of a hub's repository: parquet and README.md."""
    folder, configs = data / fixture.folder, []
    parts = [(fixture.config, fixture.rows, fixture.images)]
    if fixture.more:
        parts.append((*fixture.more, ("image",)))
    for name, rows, images in parts:
        path = f"{name or 'data'}/{fixture.split}-00000-of-00001.parquet"
        (folder / path).parent.mkdir(parents=True)
        table = datasets.Dataset.from_list(rows)
        for column in images:
            is_list = any(isinstance(row[column], list) for row in rows)
            kind = datasets.List(datasets.Image()) if is_list else datasets.Image()
            table = table.cast_column(column, kind)
        table.to_parquet(folder / path)
        files = [{"split": fixture.split, "path": path.replace("00000-of-00001", "*")}]
        configs.append({"config_name": name or "default", "data_files": files})
    front = yaml.safe_dump({"configs": configs})
    (folder / "README.md").write_text(f"---\n{front}---\n# {fixture.folder}\n")
