"""A few of a run's own samples as a data set of their own, and everything they need.

Of a large data set only the JSON is read, and the images of the chosen records.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from megatron_asvr.platforms import select

from megatron_asvr.config.schema import PARTS, Config, SourceConfig
from megatron_asvr.data import locations
from megatron_asvr.data.cache import cache_root
from megatron_asvr.data.images import ImageIndex
from megatron_asvr.data.order import StepOrder, blend
from megatron_asvr.data.pixels import BLANK_KEY, ZERO_KEY
from megatron_asvr.data.records import SHOWN, Record, read_records
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.data.views import ImageLayouts
from megatron_asvr.errors import AsvrError, ConfigError
from megatron_asvr.model.tokenizer import VisualTokenizer
from megatron_asvr.train.assemble import code_cache
from megatron_asvr.train.weight_sources import open_source

MAX_REPLACEMENTS = 20  # records tried in the place of one whose images are bad

_SPEAKERS = {"user": "human", "assistant": "gpt"}
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True, slots=True)
class Excerpt:
    """A run on a few of its own samples.

    Attributes:
        config: the run with these samples as its training data.
        samples: their ids, each different from the others.
        replaced: why images were bad whose records gave way to the next good ones.
    """

    config: Config
    samples: list[str]
    replaced: dict[str, str]


def make_excerpt(config: Config, folder: Path, *, prepare: bool) -> Excerpt:
    """The run on the first ``train.global_batch`` samples of its order.

    Args:
        config: the run.
        folder: where the records are written; images stay where they are, codes come from the
            run's cache.
        prepare: codes may be missing, because the caller computes them.

    Raises:
        ConfigError: every input that is missing or cannot be used, with the way out.
    """
    problems: list[str] = []
    parts = [_attempt(problems, read_records, [source]) for source in config.data.train]
    _attempt(problems, TextTokenizer, str(config.model.text_tokenizer))
    for part in PARTS:
        source = config.init.source(part)
        if source is not None:
            _attempt(problems, open_source, source, [part], config)
    chosen: list[Record] = []
    replaced: dict[str, str] = {}
    index = ImageIndex(config, folder=cache_root(config), device=select()[0].device)
    if all(parts):
        records = [record for part in parts for record in part or []]
        sizes = [len(part or []) for part in parts]
        chosen = _choose(config, sizes, records, index, replaced, problems)
    if config.loss.visual_weight:
        tokenizer = _attempt(problems, _visual_tokenizer, config)
        if tokenizer is not None and config.data.codes == "cache" and not prepare:
            _check_codes(config, tokenizer, chosen, index, problems)
    if problems:
        listed = "".join(f"\n- {problem}" for problem in dict.fromkeys(problems))
        raise ConfigError(f"inputs are missing or cannot be used:{listed}")
    path = folder / "samples.json"
    samples = _write(chosen, path)
    data = replace(
        config.data,
        train=(SourceConfig(path=str(path), images="/"),),
        eval=(),
        features="online",  # layouts are compared, not what is cached
        cache_dir=str(cache_root(config).absolute()),
        prefetch_batches=0,
        on_bad_sample="fail",
    )
    return Excerpt(config=replace(config, data=data), samples=samples, replaced=replaced)


def _attempt(problems: list[str], make: Callable[..., Made], *args: Any) -> Made | None:
    """What ``make`` makes, or None and another problem."""
    try:
        return make(*args)
    except AsvrError as error:
        problems.append(str(error))
        return None


def _visual_tokenizer(config: Config) -> VisualTokenizer:
    tokenizer = VisualTokenizer.load(str(config.model.visual_tokenizer))
    tokenizer.check_fits(config.model.vision)
    return tokenizer


def _choose(
    config: Config,
    sizes: Sequence[int],
    records: Sequence[Record],
    index: ImageIndex,
    replaced: dict[str, str],
    problems: list[str],
) -> list[Record]:
    """The first records of the order; one with a bad image gives way to the next."""
    steps = StepOrder(
        sizes,
        config.train.global_batch,
        seed=config.run.seed,
        taken=blend(config.data.train, sizes),
    )
    order = steps.indices(0)
    index.prepare([path for number in order for path in records[number].images])
    tries = 1 if config.data.on_bad_sample == "fail" else 1 + MAX_REPLACEMENTS
    chosen = []
    for number in order:
        candidates = (records[(number + k) % len(records)] for k in range(tries))
        # A record without images would always do, and a wrong folder would not be noticed.
        alike = (r for r in candidates if bool(r.images) == bool(records[number].images))
        good = next((r for r in alike if not _bad_images(r, index, replaced)), None)
        if good is not None:
            chosen.append(good)
    if len(chosen) < len(order):
        listed = [f"{path}: {why}" for path, why in replaced.items()]
        more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
        problems.append(
            f"images of the first samples cannot be used: {'; '.join(listed[:SHOWN])}{more}; is "
            "data.train.images the right folder? Repair them, or choose others with run.seed"
        )
    return chosen


def _bad_images(record: Record, index: ImageIndex, replaced: dict[str, str]) -> bool:
    """Whether an image of the record is bad; it is then noted."""
    unknown = [path for path in record.images if path not in index.entries]
    if unknown:
        index.prepare(unknown)
    bad = index.problems(record.images)
    replaced.update(bad)
    return bool(bad)


def _check_codes(
    config: Config,
    tokenizer: VisualTokenizer,
    chosen: Sequence[Record],
    index: ImageIndex,
    problems: list[str],
) -> None:
    """Note how many of the images have no codes."""
    cache = code_cache(config, tokenizer)
    layouts = ImageLayouts(config.model)
    found = [index.entries[path] for record in chosen for path in record.images]
    keys = [view for entry in found for view in layouts.of(entry.shape).keys(entry.key)]
    if config.data.blank_images and keys:
        keys = [BLANK_KEY]
    if config.loss.mode == "official":
        keys.append(ZERO_KEY)
    missing = cache.missing(keys)
    if missing:
        problems.append(
            f"the code cache {cache.folder} has no codes of {len(missing)} of {len(set(keys))} "
            "images; add --prepare, run `asvr tokenizer encode` with this configuration, or set "
            f"data.codes=online{cache.differences()}"
        )


def _write(records: Sequence[Record], path: Path) -> list[str]:
    """Write the records with absolute image paths; their ids, made different from each other."""
    seen: dict[str, int] = {}
    names, raw = [], []
    for record in records:
        seen[record.id] = seen.get(record.id, 0) + 1
        again = seen[record.id] > 1
        names.append(f"{record.id} (copy {seen[record.id]})" if again else record.id)
        talks = [
            [{"from": _SPEAKERS[turn.role], "value": turn.text} for turn in turns]
            for turns in record.conversations
        ]
        raw.append({"id": names[-1], "conversations": talks if len(talks) > 1 else talks[0]})
        if record.images:
            raw[-1]["image"] = [locations.absolute(image) for image in record.images]
    path.write_text(json.dumps(raw), encoding="utf-8")
    return names
