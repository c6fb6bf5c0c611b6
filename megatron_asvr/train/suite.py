"""A suite of benchmarks over ranks: each asks its share, the first scores what all answered.

Questions are put into batches before they are dealt out, so every answer comes from the same batch
whatever the number of ranks, and rules see all answers of a benchmark at once, in the order of its
rows. Answers are recorded as they come: the same command goes on from there, and one whose answers
are all recorded only scores them.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_asvr.checkpoint.folder import write_durably
from megatron_asvr.errors import ConfigError, DataError
from megatron_asvr.hf.suite.answer import Answerer, identity
from megatron_asvr.hf.suite.report import check_comparable, json_bytes, read, summary, table
from megatron_asvr.hf.suite.tasks import BENCHMARKS, LMMS_EVAL, Benchmark
from megatron_asvr.log import show_log
from megatron_asvr.parallel.collectives import gather_objects, on_first

logger = logging.getLogger(__name__)

RESULTS = "results.json"
# Batches of a rank between two records of answers; no rank waits longer than for these.
BATCHES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class SuiteRun:
    """What `asvr eval --suite` is asked to do.

    Attributes:
        model: exported folder.
        data: folder with the benchmarks.
        out: folder for answers and results.
        limit: ask the first rows of each benchmark only.
        batch: questions that are answered together.
        max_new_tokens: upper limit of an answer, where the task's own is longer.
        baseline: results of another model to compare with.
    """

    model: str
    data: str
    out: str
    limit: int | None = None
    batch: int = 8
    max_new_tokens: int | None = None
    baseline: str | None = None


def plan(data: str) -> dict[str, dict[str, Any]]:
    """Every benchmark with its facts, and ``missing`` with the reason where it has no data.

    Raises:
        ConfigError: lmms-eval is not installed, or in another version.
        DataError: a benchmark has data that its task cannot use.
    """
    lmms, tasks = _lmms(), {}
    for benchmark in BENCHMARKS:
        source = lmms.find(benchmark, Path(data))
        tasks[benchmark.name] = {
            "task": source.task,
            "version": source.version,
            "metric": benchmark.metric,
            "judge": benchmark.judge,
            "hub": source.hub,
            "num_rows_found": source.num_rows,
        }
        if not source.files:
            reason = f"{Path(data) / benchmark.folder} does not exist"
            tasks[benchmark.name]["missing"] = reason
    return tasks


def evaluate_suite(run: SuiteRun) -> dict[str, Any]:
    """The results of a suite; to be called in every rank of a job.

    Args:
        run: the same on every rank.

    Raises:
        ConfigError: lmms-eval is missing, or ``out`` holds the answers of something else.
        DataError: no benchmark has data, or one has data that its task cannot use.
        ConversionError: the model does not load.
    """
    group = dist.group.WORLD
    if group.rank() == 0:
        show_log("stderr")
    tasks = plan(run.data)
    found = [benchmark for benchmark in BENCHMARKS if "missing" not in tasks[benchmark.name]]
    if not found:
        raise DataError(
            f"{run.data} holds none of the {len(BENCHMARKS)} benchmarks; wanted folders such as "
            f"{BENCHMARKS[0].folder}; `asvr eval --suite` with --dry-run lists them"
        )
    opened = {benchmark.name: _open(benchmark, run) for benchmark in found}
    for name, task in opened.items():
        facts = {"num_rows": len(task.rows), "questions": task.identity()["questions"]}
        tasks[name] |= facts
    model = on_first(partial(_prepare, run, tasks), group=group)
    answerer = _Loader(run.model)
    for benchmark in found:
        task = opened[benchmark.name]
        record = _ask(task, answerer, run, model, group)
        tasks[benchmark.name] |= {"num_overlong": record["num_overlong"]}
        tasks[benchmark.name] |= on_first(partial(_score, task, record["answers"]), group=group)
    report = summary(tasks, lmms_eval=LMMS_EVAL, model=run.model, **model, limit=run.limit)
    on_first(partial(_write, run, report), group=group)
    return report


def _lmms() -> Any:
    """The module behind which lmms-eval is."""
    try:
        from megatron_asvr.hf.suite import lmms
    except ImportError as e:
        raise ConfigError(
            f"lmms-eval {LMMS_EVAL} cannot be imported ({e}); run `make setup-eval` and put its "
            "folder .venv-eval on PYTHONPATH, or install the packages of the extra eval"
        ) from e
    return lmms


def _open(benchmark: Benchmark, run: SuiteRun) -> Any:
    options = {"limit": run.limit, "max_new_tokens": run.max_new_tokens}
    return _lmms().Task(benchmark, Path(run.data), **options)


def _prepare(run: SuiteRun, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the answers of this model depend on, after everything else was checked."""
    if run.baseline:
        check_comparable(tasks, read(run.baseline), run.baseline)
    return identity(run.model) | {"batch": run.batch}


class _Loader:
    """Loads the model when the first question is asked; recorded answers need none."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._answerer: Answerer | None = None

    def __call__(self) -> Answerer:
        if self._answerer is None:
            self._answerer = Answerer(self._folder)
        return self._answerer


def _ask(
    task: Any, answerer: _Loader, run: SuiteRun, model: Mapping[str, Any], group: dist.ProcessGroup
) -> dict[str, Any]:
    """The record of a benchmark, complete: ``answers`` by row, and ``num_overlong``."""
    path = Path(run.out) / "answers" / f"{task.benchmark.folder}.json"
    facts = {**model, **task.identity()}
    record = on_first(partial(_recorded, path, facts), group=group)
    answers, world = record["answers"], group.size()
    rest = [batch for batch in _batches(task, run.batch) if not answers.keys() >= set(batch)]
    for start in range(0, len(rest), BATCHES_AT_ONCE * world):
        share = rest[start : start + BATCHES_AT_ONCE * world][group.rank() :: world]
        for theirs, overlong in gather_objects(_answer(task, answerer, share), group=group):
            answers.update(theirs)
            record["num_overlong"] += overlong
        on_first(partial(write_durably, path, json_bytes(record)), group=group)
        done = (task.benchmark.name, len(answers), len(task.rows))
        logger.info("%s: %d of %d questions answered", *done)
    return record


def _batches(task: Any, size: int) -> list[list[str]]:
    """Rows that are asked together, longest questions first; the same whoever asks."""
    order = sorted(range(len(task.rows)), key=lambda i: (-len(task.prompts[i]), i))
    rows = [str(task.rows[i]) for i in order]
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _answer(
    task: Any, answerer: _Loader, batches: Sequence[Sequence[str]]
) -> tuple[dict[str, str], int]:
    """This rank's answers by row, and how many of its questions were too long for the model."""
    prompts = dict(zip(map(str, task.rows), task.prompts, strict=True))
    answers: dict[str, str] = {}
    before = answerer().num_overlong if batches else 0
    for batch in batches:
        texts = answerer().answers(
            [prompts[row] for row in batch],
            [task.pictures(int(row)) for row in batch],
            max_new_tokens=task.max_new_tokens,
            until=task.until,
        )
        answers |= dict(zip(batch, texts, strict=True))
    return answers, answerer().num_overlong - before if batches else 0


def _recorded(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The record in ``path``, or an empty one."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return {"identity": facts, "answers": {}, "num_overlong": 0}
    record = read(path)
    other = [key for key in facts if record["identity"].get(key) != facts[key]]
    if other:
        raise ConfigError(
            f"{path} holds answers of another run: {', '.join(other)} differ; give another --out, "
            "or delete the file"
        )
    return record


def _score(task: Any, answers: Mapping[str, str]) -> dict[str, Any]:
    score, metrics = task.score([answers[str(row)] for row in task.rows])
    return {"score": score, "metrics": metrics}


def _write(run: SuiteRun, report: Mapping[str, Any]) -> None:
    baseline = read(run.baseline) if run.baseline else None
    write_durably(Path(run.out) / RESULTS, json_bytes(report))
    text = "\n".join(table(report, baseline)) + "\n"
    write_durably((Path(run.out) / RESULTS).with_suffix(".md"), text.encode())
