"""Questions to a trained run: answers, accuracy, and the proof of its export.

Every question is asked alone. The functions are called in every rank; data-parallel ranks share
the questions, and the results come back on every rank in the order of the questions.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_asvr.config.schema import SourceConfig
from megatron_asvr.data import locations
from megatron_asvr.data.conversation import Turn, prompt_text
from megatron_asvr.data.evalset import EvalItem, read_questions
from megatron_asvr.data.records import raise_problems
from megatron_asvr.data.text import IMAGE_TOKEN
from megatron_asvr.errors import ConfigError, DataError
from megatron_asvr.hf.run import kind_of
from megatron_asvr.hf.verify import VerifySample, exported_dtype, verify
from megatron_asvr.log import Progress, show_log
from megatron_asvr.parallel.collectives import gather_objects
from megatron_asvr.parallel.groups import Groups, initialize
from megatron_asvr.parallel.plan import make_plan
from megatron_asvr.train.generate import Prompt
from megatron_asvr.train.inference import Answerer, inference_config

ASKED_AT_ONCE = 512  # questions between two progress lines


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """Which questions to ask.

    Attributes:
        source: LLaVA-format records; every assistant turn is a reference answer to the turns
            before it, and independent conversations are independent questions.
        limit: at most so many questions, spread evenly over all; None asks all.
        max_new_tokens: longest answer.
    """

    source: SourceConfig
    limit: int | None = None
    max_new_tokens: int = 32


def read_items(
    questions: Questions, *, first_only: bool = False, text_only: bool = False
) -> list[EvalItem]:
    """The questions of a source, in order.

    Args:
        questions: which.
        first_only: take the first question of each dialogue alone; the limit counts these.
        text_only: take questions without images alone; likewise.

    Raises:
        DataError: records have the wrong form, or none has an answer.
    """
    items = read_questions([questions.source])
    if first_only:
        items = [item for item in items if len(item.turns) == 1]
    if text_only:
        items = [item for item in items if not item.images]
        if not items:
            raise DataError(
                f"{questions.source.path}: every question has an image, and a language model alone "
                "sees none; give questions about text"
            )
    if questions.limit is None or questions.limit >= len(items):
        return items
    return [items[len(items) * i // questions.limit] for i in range(questions.limit)]


def evaluate_run(run: str, questions: Questions, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Accuracy by exact match, and every answer.

    Args:
        run: run folder or checkpoint.
        questions: with their references.
        overrides: ``a.b=c`` settings that win over the run's, e.g. another layout.
    """
    started = time.monotonic()
    items = read_items(questions)
    check_exist([path for item in items for path in item.images])
    answerer, groups = open_run(run, overrides, questions.max_new_tokens)
    prompts = [answerer.prompt(i.turns, i.images) for i in items[groups.dp_rank :: groups.plan.dp]]
    answers = _gather(_answer(answerer, prompts, groups), groups)
    rows = [
        {
            "id": item.id,
            "images": list(item.images),
            "question": item.question,
            "reference": item.reference,
            "answer": answer,
            "correct": answer == item.reference,
        }
        for item, answer in zip(items, answers, strict=True)
    ]
    correct = sum(row["correct"] for row in rows)
    return {
        "run": run,
        "data": questions.source.path,
        "num_questions": len(rows),
        "num_correct": correct,
        "accuracy": correct / len(rows),
        "seconds": round(time.monotonic() - started, 2),
        "answers": rows,
    }


def ask(
    run: str,
    questions: Sequence[str],
    images: Sequence[str],
    overrides: Sequence[str] = (),
    max_new_tokens: int = 64,
) -> list[str]:
    """Answers to questions about the same images.

    Args:
        run: run folder or checkpoint.
        questions: texts, without placeholders.
        images: paths.
        overrides: ``a.b=c`` settings that win over the run's.
        max_new_tokens: longest answer.
    """
    check_exist(images)
    answerer, groups = open_run(run, overrides, max_new_tokens)
    placeholders = f"{IMAGE_TOKEN}\n" * len(images)
    turns = [(Turn("user", (placeholders + question).strip()),) for question in questions]
    prompts = [answerer.prompt(turn, images) for turn in turns[groups.dp_rank :: groups.plan.dp]]
    return _gather(_answer(answerer, prompts, groups), groups)


def verify_run(
    run: str, folder: str, questions: Questions, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """The report of comparing an exported folder with its run on real questions.

    Args:
        run: run folder or checkpoint.
        folder: the exported folder.
        questions: about images the comparison uses; only first questions are taken, and of a
            language model alone only those without images.
        overrides: ``a.b=c`` settings that win over the run's.

    Raises:
        ConfigError: more than one data-parallel rank.
        DataError: there is no question to ask.
    """
    text_only = kind_of(folder) == "text"
    items = read_items(questions, first_only=True, text_only=text_only)
    check_exist([path for item in items for path in item.images])
    answerer, groups = open_run(
        run,
        ("train.precision=fp32", *overrides),
        questions.max_new_tokens,
        rounded_to=exported_dtype(folder),
    )
    if groups.plan.dp > 1:
        raise ConfigError(f"verify compares in one model replica; got {groups.plan.describe()}")
    prompts = [answerer.prompt(item.turns, item.images) for item in items]
    answers = answerer.answers(prompts)
    samples = []
    for item, prompt, answer in zip(items, prompts, answers, strict=True):
        samples.append(
            VerifySample(
                name=item.id,
                prompt=prompt_text(item.turns, answerer.template),
                images=item.images,
                token_ids=prompt.token_ids,
                pixel_values_ICHW=answerer.pixels(prompt.images).cpu() if prompt.images else None,
                logits_ST=answerer.logits(prompt).cpu(),
                answer_ids=tuple(answer),
                answer=answerer.text.decode(answer),
                messages=_messages(item),
            )
        )
    if groups.rank:
        return {}
    return verify(folder, samples, max_new_tokens=questions.max_new_tokens)


def check_exist(images: Sequence[str]) -> None:
    """Return when all images are there: known before a model is loaded.

    Raises:
        DataError: files are missing.
    """
    missing = [
        image
        for image in dict.fromkeys(images)
        if not locations.is_url(image) and not Path(locations.container(image)).is_file()
    ]
    raise_problems(missing, "images of the questions are missing")


def open_run(
    run: str,
    overrides: Sequence[str],
    max_new_tokens: int,
    *,
    rounded_to: torch.dtype | None = None,
) -> tuple[Answerer, Groups]:
    """A run's model in this process's layout, and the layout's groups; see ``Answerer``."""
    if dist.get_rank() == 0:
        show_log("stderr")
    config = inference_config(run, overrides)
    groups = initialize(make_plan(config, dist.get_world_size()))
    answerer = Answerer(
        run, config, groups=groups, max_new_tokens=max_new_tokens, rounded_to=rounded_to
    )
    return answerer, groups


def _answer(answerer: Answerer, prompts: Sequence[Prompt], groups: Groups) -> list[str]:
    """This rank's answers as text, with a progress line now and then."""
    texts: list[str] = []
    progress = Progress("answers", len(prompts), unit="questions of this rank")
    for start in range(0, len(prompts), ASKED_AT_ONCE):
        answers = answerer.answers(prompts[start : start + ASKED_AT_ONCE])
        texts += [answerer.text.decode(answer).strip() for answer in answers]
        if groups.rank == 0:
            progress.add(len(answers))
    return texts


def _gather(mine: list[str], groups: Groups) -> list[str]:
    """The answers of all data-parallel ranks; rank r holds questions r, r + dp, ..."""
    dp = groups.plan.dp
    everyone = gather_objects(mine, group=groups.dp)
    return [everyone[i % dp][i // dp] for i in range(sum(map(len, everyone)))]


def _messages(item: EvalItem) -> list[dict[str, Any]]:
    parts: list[dict[str, str]] = []
    for number, words in enumerate(item.turns[-1].text.split(IMAGE_TOKEN)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": words.strip("\n")}] if words.strip() else []
    return [{"role": "user", "content": parts}]
