"""What makes a run the same run: every setting that changes its numbers, and its files' content.

A run may only be continued as itself. Settings that change neither the mathematics nor the
rounding (where to log, how often to save) may differ between two starts; the layout of the ranks
and who multiplies (``engine``) may differ too, since a checkpoint does not depend on them, but then
the continuation is equal only up to rounding, which is logged.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_asvr.config.load import flatten
from megatron_asvr.config.schema import TEMPLATES, Config, SourceConfig
from megatron_asvr.data import locations
from megatron_asvr.data.formats import data_files, source_format
from megatron_asvr.data.templates import find_template
from megatron_asvr.data.text import TextTokenizer, tokenizer_file
from megatron_asvr.errors import CheckpointError, ConfigError

# May change between two starts of one run.
_FREE = {
    "run.dir",
    "run.wandb",
    "run.wandb_project",
    "data.eval",
    "data.cache_dir",
    "data.encode_missing",
    "data.codes_verify_fraction",
    "data.codes_max_flip",
    "data.decode_threads",
    "data.prefetch_batches",
    "train.eval_every_steps",
    "train.save_every_steps",
    "train.keep_checkpoints",
    "train.keep_every_steps",
    "train.async_save",
    "train.log_every_steps",
    "train.cosine_every_steps",
    "train.watchdog.hang_s",
    "train.watchdog.slow_share",
    "train.anomaly.on_nonfinite",
    "train.anomaly.on_spike",
    "train.anomaly.spike_window",
    "train.anomaly.spike_mads",
    "train.anomaly.max_events",
}
# Files count by their content, not by where they lie.
_BY_CONTENT = {"data.train", "model.text_tokenizer", "model.visual_tokenizer"}
_LAYOUT = "parallel."
# Who multiplies, and in how many bits weights lie between steps: equal up to rounding.
_ENGINE = (
    "precision.backend",
    "precision.kernels",
    "precision.fp8.emulate",
    "precision.fp8.weights",
    "train.compile",
    "train.cuda_graphs",
)
_NO_FACT = _FREE | _BY_CONTENT | {*_ENGINE}
_PLAIN = SourceConfig(path="")
TEXT_TOKENIZER = "model.text_tokenizer (content)"  # names of their fingerprints in an identity
VISUAL_TOKENIZER = "model.visual_tokenizer (content)"


def identity(
    config: Config, *, tokenizer_fingerprint: str | None, image_keys: Sequence[str]
) -> dict[str, Any]:
    """Everything that a continuation of the run must have in common with it, by name.

    Args:
        config: the run's configuration.
        tokenizer_fingerprint: content hash of the visual tokenizer, None without one.
        image_keys: content hashes of the training images that can be used.

    Raises:
        ConfigError: a training file or the text tokenizer cannot be read.
    """
    facts = _settings(config)
    facts["data.train (number of files)"] = len(config.data.train)
    for number, source in enumerate(config.data.train):
        name = f"data.train[{number}].path"
        facts[f"{name} (content)"] = _content(name, source)
        for key in ("weight", "epochs", "max_samples"):
            value = getattr(source, key)
            if value != getattr(_PLAIN, key):  # so that earlier checkpoints go on
                facts[f"data.train[{number}].{key}"] = value
    images = hashlib.sha256("".join(image_keys).encode()).hexdigest()
    facts["data.train (content of the images)"] = images
    if config.model.text_tokenizer is not None:
        facts |= _text_facts(config.model.text_tokenizer, config.data.template)
    facts[VISUAL_TOKENIZER] = tokenizer_fingerprint
    return facts


def _settings(config: Config) -> dict[str, Any]:
    """Settings that change a run's numbers, as a checkpoint gives them back."""
    return {
        key: json.loads(json.dumps(value))
        for key, value in flatten(config).items()
        if key not in _NO_FACT and not key.startswith(_LAYOUT)
    }


def engine(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of who multiplies, by name, of a configuration of plain values."""
    found = flatten(Config())
    for name in _ENGINE:
        value: Any = config
        for key in name.split("."):
            value = value.get(key, {})
        found[name] = found[name] if value == {} else value
    return {name: found[name] for name in _ENGINE}


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], *, where: str) -> None:
    """Return when a run may continue from a checkpoint.

    A setting that the checkpoint's version did not have counts as its default, one that is
    no fact any more not at all.

    Args:
        saved: the checkpoint's identity.
        now: the identity of the run that wants to continue.
        where: the checkpoint's path.

    Raises:
        CheckpointError: they differ; every key is named with its old and new value.
    """
    default = _settings(Config())
    changed = [
        f"{key}: checkpoint has {before!r}, this run has {now.get(key)!r}"
        for key in sorted((saved.keys() | now.keys()) - _NO_FACT)
        if (before := saved.get(key, default.get(key))) != now.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{where} belongs to another run; " + "; ".join(changed) + ". Restore these settings "
            "to continue it, or set run.dir to a new folder (init.all can start from this one)"
        )


def _content(key: str, source: SourceConfig) -> str:
    """Hash of a JSON file; of other sources, whose images count by themselves, names and sizes."""
    if source_format(source) == "json" and not locations.is_url(source.path):
        return _sha256(key, source.path)
    try:
        files = [] if source_format(source) == "images" else data_files(source)
        listed = [(file.rpartition("/")[2], locations.state(file)[0]) for file in files]
    except OSError as err:
        raise ConfigError(f"{key}={source.path!r} cannot be read: {err.strerror or err}") from None
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def _text_facts(path: str, template: str) -> dict[str, Any]:
    file, facts = tokenizer_file(path), {}
    if file.suffix != ".json":
        facts[TEXT_TOKENIZER] = _sha256("model.text_tokenizer", str(file))
    else:
        facts[TEXT_TOKENIZER] = TextTokenizer(file).fingerprint
    if template not in TEMPLATES:
        jinja = find_template(template, TextTokenizer(file)).text
        facts["data.template"] = f"Jinja, {hashlib.sha256(jinja.encode()).hexdigest()}"
    return facts


def _sha256(key: str, path: str) -> str:
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as err:
        raise ConfigError(f"{key}={path!r} cannot be read: {err.strerror}") from None
