"""Files of a whole small run: images, records, a text tokenizer and a visual tokenizer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.config.schema import Config
from megatron_asvr.data.text import TextTokenizer
from tests.run_cases import config, tokenizer

COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 180, 40),
    "blue": (20, 60, 210),
    "grey": (90, 90, 90),
}
SHAPES = ("left", "right")


def make_files(folder: Path, *, images: int = 12) -> Path:
    """Write everything below ``folder`` and return it; ``run_config`` points there."""
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    records: list[dict[str, Any]] = []
    for number in range(images):
        colour, side = list(COLOURS)[number % 4], SHAPES[number % 2]
        pixels = generator.integers(0, 40, (16, 16, 3)).astype(np.uint8)
        half = slice(0, 8) if side == "left" else slice(8, 16)
        pixels[:, half] += np.array(COLOURS[colour], dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        questions = [("Which color?", colour), ("Which side?", side), (f"Is it {colour}?", "yes")]
        talks = [
            [
                {"from": "human", "value": f"<image>\n{question}" if i == 0 else question},
                {"from": "gpt", "value": answer},
            ]
            for i, (question, answer) in enumerate(questions)
        ]
        records.append({"id": f"q{number}", "image": f"{number}.png", "conversations": talks})
    words = [{"from": "human", "value": "Say yes."}, {"from": "gpt", "value": "yes"}]
    records.append({"id": "text", "conversations": words})
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "eval.json").write_text(json.dumps(records[:3]))
    texts = ["USER: Which color? ASSISTANT: red green blue grey left right yes Is it Say"] * 40
    TextTokenizer.train(texts, folder / "text.model", vocab_size=300)
    tokenizer(config().model.vision).save(folder / "visual")
    return folder


def run_config(files: Path, run: Path, **changes: Any) -> Config:
    """A run on the files of ``make_files``; ``section__name=value`` changes a setting."""
    return config(
        **{
            "run__dir": str(run),
            "model__text_tokenizer": str(files / "text.model"),
            "model__visual_tokenizer": str(files / "visual"),
            "model__language__vocab_size": 300,
            "data__train": [{"path": str(files / "train.json"), "images": str(files / "images")}],
            "data__eval": [{"path": str(files / "eval.json"), "images": str(files / "images")}],
            "data__template": "vicuna_short",
            "data__max_length": 128,
            "data__cache_dir": str(files / "codes"),
            "train__log_every_steps": 2,
            "train__save_every_steps": 2,
            **changes,
        }
    )


# Of a line of metrics: what a clock says, or a window that begins anew with every start.
CLOCKED = (
    "tokens_per_s",
    "step_s",
    "data_wait",
    "rank_wait",
    "bubble",
    "mfu",
    "tflops",
    "eval_s",
    "save_s",
)
CLOCKED += ("elapsed_s", "lost_s", "goodput")
UNEQUAL = (*CLOCKED, "codes_used", "code_perplexity")


def all_lines(config: Config) -> list[dict[str, Any]]:
    """The metrics of a run."""
    return [json.loads(line) for line in RunFolder(config.run.dir).metrics.open()]


def repeatable_lines(config: Config, *left_out: str) -> list[dict[str, Any]]:
    """The metrics of a run, as far as they do not depend on how often it was interrupted."""
    return [
        {k: v for k, v in line.items() if not k.startswith((*UNEQUAL, *left_out))}
        for line in all_lines(config)
        if line["kind"] != "start"
    ]
