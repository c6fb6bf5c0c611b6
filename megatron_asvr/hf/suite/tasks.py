"""The 14 benchmarks of the ASVR paper: which task of lmms-eval each is, and who judges it.

Everything else (data set, prompt, length of an answer, extraction, scoring) is in lmms-eval's own
files at the pinned version. All judges are rules: an offline node can call no other model.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

SUITE = "asvr14"
LMMS_EVAL = "0.7.3"


_PERCEPTION = (
    "existence", "count", "position", "color", "posters",
    "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip


def _one(_: Sequence[Any]) -> float:
    return 1.0


def _hundred(_: Sequence[Any]) -> float:
    return 100.0


def _mme(values: Sequence[Any]) -> float:
    """200 points for every category there is; the whole set has the ten of perception."""
    return 200.0 * len({value["category"] for value in values})


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: as papers write it.
        folder: of its data, and what its files are called.
        file: the task's YAML below lmms-eval's ``tasks``.
        metric: the one of the task's metrics that the table shows.
        judge: how an answer is judged.
        best: the metric's largest value, from what the rows gave; the score is in percent of it.
        only: column and values of the rows that the metric counts; the others are not asked.
        together: key of rows that count only together (pairs); a limit never splits them.
    """

    name: str
    folder: str
    file: str
    metric: str
    judge: str
    best: Callable[[Sequence[Any]], float] = _one
    only: tuple[str, tuple[str, ...]] | None = None
    together: Callable[[Row], Hashable] | None = None


BENCHMARKS = (
    Benchmark(
        name="TextVQA",
        folder="textvqa",
        file="textvqa/textvqa_val.yaml",
        metric="exact_match",
        judge="rule: VQA accuracy against ten answers",
    ),
    Benchmark(
        name="DocVQA",
        folder="docvqa",
        file="docvqa/docvqa_val.yaml",
        metric="anls",
        judge="rule: ANLS, threshold 0.5",
    ),
    Benchmark(
        name="OCRBench",
        folder="ocrbench",
        file="ocrbench/ocrbench.yaml",
        metric="ocrbench_accuracy",
        judge="rule: a reference is contained in the answer",
    ),
    Benchmark(
        name="ChartQA",
        folder="chartqa",
        file="chartqa/chartqa.yaml",
        metric="relaxed_overall",
        judge="rule: equal, numbers within 5 %",
    ),
    Benchmark(
        name="MMBench",
        folder="mmbench",
        file="mmbench/mmbench_en_dev_static.yaml",
        metric="gpt_eval_score",
        judge="rule: option letter or text (the static variant; GPT is not asked)",
        best=_hundred,
    ),
    Benchmark(
        name="MME",
        folder="mme",
        file="mme/mme.yaml",
        metric="mme_perception_score",
        judge="rule: yes or no at the start, accuracy + accuracy of pairs",
        best=_mme,
        only=("category", _PERCEPTION),
        together=lambda row: (row["category"], row["question_id"]),
    ),
    Benchmark(
        name="SEED",
        folder="seedbench",
        file="seedbench/seedbench.yaml",
        metric="seed_image",
        judge="rule: first character",
        only=("data_type", ("image",)),
    ),
    Benchmark(
        name="GQA",
        folder="gqa",
        file="gqa/gqa.yaml",
        metric="exact_match",
        judge="rule: equal without case and punctuation",
    ),
    Benchmark(
        name="MMMU",
        folder="mmmu",
        file="mmmu/mmmu_val.yaml",
        metric="mmmu_acc",
        judge="rule: parsed option or phrase; without any, an option drawn with a fixed seed",
    ),
    Benchmark(
        name="AI2D",
        folder="ai2d",
        file="ai2d/ai2d.yaml",
        metric="exact_match",
        judge="rule: option letter",
    ),
    Benchmark(
        name="RealWorldQA",
        folder="realworldqa",
        file="realworldqa/realworldqa.yaml",
        metric="exact_match",
        judge="rule: option letter, or equal",
    ),
    Benchmark(
        name="MMVP",
        folder="mmvp",
        file="mmvp/mmvp.yaml",
        metric="mmvp_pair_accuracy",
        judge="rule: option letter, both of a pair",
        together=lambda row: (row["Index"] - 1) // 2,
    ),
    Benchmark(
        name="HallusionBench",
        folder="hallusion_bench",
        file="hallusion_bench/hallusion_bench_image.yaml",
        metric="aAcc",
        judge="rule: whether the answer has a yes (lmms-eval's own rule; its default asks GPT-4)",
    ),
    Benchmark(
        name="POPE",
        folder="pope",
        file="pope/pope.yaml",
        metric="pope_f1_score",
        judge="rule: the answer is yes or no, nothing else; F1",
    ),
)
