"""The one door to lmms-eval and its data: a task with local data, its prompts and its scores.

A task here is lmms-eval's own object with its own YAML and functions. Changed are only where the
data comes from (a folder instead of a hub) and, of three tasks, what cannot work on an offline node
or on a part of the rows; ``_OFFLINE`` holds each of these changes.

Import this module late: it needs the extra ``eval``.
"""

import contextlib
import functools
import hashlib
import inspect
import io
import json
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lmms_eval.tasks
import pyarrow.parquet
from lmms_eval.api.instance import Instance
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.utils import load_yaml_config
from loguru import logger as lmms_log

from megatron_asvr.data.text import IMAGE_TOKEN
from megatron_asvr.errors import ConfigError, DataError
from megatron_asvr.hf.suite.tasks import LMMS_EVAL, Benchmark, Row

# When a task names no length: what lmms-eval's own LLaVA model takes.
MAX_NEW_TOKENS = 1024
_SUBMISSION = "submission"  # a "metric" that writes a file for a server
_GQA_IMAGES = "testdev_balanced_images"
_PACKAGE = Path(lmms_eval.__path__[0])

datasets.disable_progress_bars()
lmms_log.disable("")  # of its users only lmms-eval is here, under many names

if (_found := version("lmms-eval")) != LMMS_EVAL:
    raise ConfigError(
        f"lmms-eval {_found} is installed; the suite is pinned to {LMMS_EVAL}, since rules and "
        "data sets change between versions; run `make setup-eval`"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The local data of a benchmark.

    Attributes:
        task: the task's name in lmms-eval.
        version: the version in its YAML; "-" where that has none.
        hub: data set, configuration and split that lmms-eval would download.
        files: the local parquet files with the rows; empty when the folder is missing.
        num_rows: rows in them.
    """

    task: str
    version: str
    hub: str
    files: tuple[str, ...]
    num_rows: int


def find(benchmark: Benchmark, data: Path) -> Source:
    """Where the rows of a benchmark are; ``files`` is empty when its folder is missing.

    Args:
        benchmark: which.
        data: folder with one folder a benchmark, each a mirror of the data set on the hub.

    Raises:
        DataError: the folder is there, but without the configuration and split of the task.
    """
    config = _config(benchmark, data)
    name, split = config.get("dataset_name"), config["test_split"]
    hub = "/".join(filter(None, (config["hub"], name))) + f":{split}"
    files: tuple[str, ...] = ()
    if (data / benchmark.folder).is_dir():
        files = _files(data / benchmark.folder, name, split)
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, dict):
        metadata = {k: v for part in metadata for k, v in part.items()}
    return Source(
        task=config["task"],
        version=str(metadata.get("version", "-")),
        hub=hub,
        files=files,
        num_rows=sum(pyarrow.parquet.read_metadata(file).num_rows for file in files),
    )


def _files(folder: Path, name: str | None, split: str) -> tuple[str, ...]:
    wanted = f"parquet files of split {split!r}" + (f" of configuration {name!r}" if name else "")
    try:
        builder = datasets.load_dataset_builder(str(folder), name)
        files = tuple(map(str, (builder.config.data_files or {}).get(split, ())))
    except Exception as e:  # datasets raises many types here, all of them about this folder
        raise DataError(f"{folder}: wanted {wanted}, as on the hub, README.md included; {e}") from e
    if not files or any(not file.endswith(".parquet") for file in files):
        raise DataError(f"{folder}: wanted {wanted}, as on the hub; got {list(files)[:3]}")
    return files


def _config(benchmark: Benchmark, data: Path) -> dict[str, Any]:
    """The task's YAML, with local data in the place of the hub's (which stays as ``hub``)."""
    config = load_yaml_config(str(_PACKAGE / "tasks" / benchmark.file), mode="full")
    config |= {"hub": config["dataset_path"], "dataset_path": str(data / benchmark.folder)}
    config.pop("dataset_kwargs", None)
    change = _OFFLINE.get(benchmark.name)
    return change(config) if change else config


def _gqa(config: dict[str, Any]) -> dict[str, Any]:
    """GQA's function that joins images to questions loads them from a hub by a fixed name."""
    folder, split = config["dataset_path"], config["test_split"]

    @functools.cache
    def images() -> tuple[Any, dict[str, int]]:
        table = _load(folder, _GQA_IMAGES, split)
        return table, {key: i for i, key in enumerate(table["id"])}

    def doc_to_visual(doc: Row) -> list[Any]:
        table, number = images()
        return [table[number[doc["imageId"]]]["image"].convert("RGB")]

    return config | {"process_docs": None, "doc_to_visual": doc_to_visual}


def _hallusion(config: dict[str, Any]) -> dict[str, Any]:
    """HallusionBench's YAML asks GPT-4 and holds this rule, of the same file, in comments."""
    from lmms_eval.tasks.hallusion_bench import evaluate_hb

    def metric(name: str) -> dict[str, Any]:
        rule = getattr(evaluate_hb, f"hb_aggregation_result_{name}_intern")
        return {"metric": name, "aggregation": rule, "higher_is_better": True}

    return config | {"metric_list": [metric(name) for name in ("aAcc", "qAcc", "fAcc")]}


def _ocrbench(config: dict[str, Any]) -> dict[str, Any]:
    """OCRBench divides by 1000 whatever was asked and adds to what it counted before."""

    def mean(values: Sequence[Row]) -> float:
        return statistics.fmean(value["score"] for value in values)

    (metric,) = config["metric_list"]
    return config | {"metric_list": [metric | {"aggregation": mean}]}


_OFFLINE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "GQA": _gqa,
    "HallusionBench": _hallusion,
    "OCRBench": _ocrbench,
}


def _load(folder: str, name: str | None, split: str) -> Any:
    """The rows of a split; the first time they are copied to the cache of `datasets`.

    Its own key is the name of the folder: without ours, files that were replaced would go unseen.
    """
    states = [(file, os.stat(file)) for file in _files(Path(folder), name, split)]
    key = hashlib.sha256(repr([(f, s.st_size, s.st_mtime_ns) for f, s in states]).encode())
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"asvr-{key.hexdigest()[:32]}"
    try:
        return datasets.load_dataset(folder, name, split=split, cache_dir=str(cache))
    except Exception as e:  # datasets raises many types here, all of them about this folder
        raise DataError(f"{folder}: configuration {name!r}, split {split!r}: {e}") from e


class _LocalTask(ConfigurableTask):
    """A task of lmms-eval whose data lies in a folder."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
        split = self.config.test_split
        rows = _load(self.config.dataset_path, self.config.dataset_name, split)
        features = {key: getattr(x, "feature", x) for key, x in rows.features.items()}  # of lists
        images = [key for key, x in features.items() if isinstance(x, datasets.Image)]
        self.dataset = {split: rows}
        self.dataset_no_image = {split: rows.remove_columns(images)}


class Task:
    """One benchmark, opened: its prompts, its pictures, its scores.

    Attributes:
        benchmark: which.
        source: where its rows come from.
        rows: numbers of the rows that are asked.
        prompts: the question of each of them as text, without the images.
        max_new_tokens: longest answer.
        until: texts that end an answer.
    """

    def __init__(
        self, benchmark: Benchmark, data: Path, *, limit: int | None, max_new_tokens: int | None
    ) -> None:
        self.benchmark, self.source = benchmark, find(benchmark, data)
        config = {k: v for k, v in _config(benchmark, data).items() if k != "hub"}
        with _as_data_error(f"{data / benchmark.folder}"):
            self._task = _LocalTask(config=config)
            self._docs = self._task.eval_docs_no_media
            self.rows = self._select(limit)
            self.prompts = [self._prompt(row) for row in self.rows]
            # A missing column or image shows before hours of answers.
            self._values(self.rows[:1], [""])
            self.pictures(self.rows[0])
        options = self._task.config.generation_kwargs
        self.max_new_tokens = min(
            options.get("max_new_tokens") or MAX_NEW_TOKENS, max_new_tokens or MAX_NEW_TOKENS
        )
        until = options.get("until") or []
        self.until = tuple(x for x in ([until] if isinstance(until, str) else until) if x)

    def _select(self, limit: int | None) -> list[int]:
        """The first rows that count, as many as ``limit`` and what belongs to them."""
        rows, benchmark = range(len(self._docs)), self.benchmark
        if benchmark.only:
            column, values = benchmark.only
            rows = [i for i, found in enumerate(self._docs[column]) if found in values]
            if not rows:
                raise DataError(f"no row has one of {values} as its {column!r}")
        if limit is None or benchmark.together is None:
            return list(rows)[:limit]
        keys = [benchmark.together(self._docs[i]) for i in rows]
        wanted = set(keys[:limit])
        return [i for i, key in zip(rows, keys, strict=True) if key in wanted]

    def _prompt(self, row: int) -> str:
        text = self._task.doc_to_text(self._docs[row])
        if IMAGE_TOKEN in text:
            raise DataError(f"row {row}: the question holds {IMAGE_TOKEN!r}: {text[:80]!r}")
        return text

    def pictures(self, row: int) -> list[Any]:
        """The images (PIL, RGB) of a row.

        Raises:
            DataError: they are missing or cannot be decoded.
        """
        with _as_data_error(f"{self.benchmark.folder}: row {row}"):
            return self._task.doc_to_visual(self._task.task_docs[row])

    def identity(self) -> dict[str, Any]:
        """What recorded answers belong to: the task, its data, its questions."""
        asked = json.dumps([self.rows, self.prompts, self.max_new_tokens, self.until])
        return {
            "lmms_eval": LMMS_EVAL,
            "task": self.source.task,
            "data_bytes": [Path(file).stat().st_size for file in self.source.files],
            "questions": hashlib.sha256(asked.encode()).hexdigest(),
        }

    def score(self, answers: Sequence[str]) -> tuple[float, dict[str, float]]:
        """The score in percent, and every metric of the task by name.

        Args:
            answers: one for each of ``rows``.

        Raises:
            DataError: lmms-eval's rules fail on a row.
        """
        metrics = {}
        random.seed(0)  # MMMU's rule draws
        with _as_data_error(self.benchmark.folder), _quiet() as folder:
            values = self._values(self.rows, answers)
            for name, found in values.items():
                rule = self._task.aggregation()[name]
                wants_args = "args" in inspect.signature(rule).parameters
                more = (SimpleNamespace(output_path=folder),) if wants_args else ()
                metrics[name] = float(rule(found, *more))
        best = self.benchmark.best(values[self.benchmark.metric])
        return 100 * metrics[self.benchmark.metric] / best, metrics

    def _values(self, rows: Sequence[int], answers: Sequence[str]) -> dict[str, list[Any]]:
        """What lmms-eval's rule gives for every answer, by metric."""
        docs = self._docs.select(rows)
        facts = {"task": self.source.task, "repeats": 1}
        asked = [
            Instance("generate_until", (), 0, facts | {"doc_id": row}, resps=[answer])
            for row, answer in zip(rows, answers, strict=True)
        ]
        (filters,) = self._task._filters
        filters.apply(asked, docs)
        known = self._task.aggregation().keys() - {_SUBMISSION}
        values: dict[str, list[Any]] = {}
        # Past the decorator: it tries five times, and rules give the same every time.
        rule = ConfigurableTask.process_results.__wrapped__
        for instance, doc in zip(asked, docs, strict=True):
            found = rule(self._task, doc, [instance.filtered_resps[filters.name]])
            for name in known & found.keys():
                values.setdefault(name, []).append(found[name])
        return values


@contextlib.contextmanager
def _as_data_error(where: str) -> Iterator[None]:
    """Turn what lmms-eval's functions raise on a row into an error of ours."""
    try:
        yield
    except DataError:
        raise
    except Exception as e:  # of many types: a column, a value or an image is not what a rule wants
        raise DataError(
            f"{where}: the task cannot use this data: {type(e).__name__}: {e}; wanted: a mirror of "
            "the data set that the pinned lmms-eval names"
        ) from e


@contextlib.contextmanager
def _quiet() -> Iterator[str]:
    """A folder for the files that some rules write; what they print is dropped."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        yield folder
