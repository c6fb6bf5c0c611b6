"""Weights from elsewhere under our names: complete, or refused before anything is loaded.

Nothing is taken on trust. Every tensor on disk has its place in a table, with the right shape, or
is on the list of tensors that a model of its kind does not need; and every tensor of the table is
there, unless the caller names it as one that may be missing.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_asvr.config.compare import differences
from megatron_asvr.config.schema import (
    PARTS,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
    VisualHeadConfig,
)
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf.tables import Rule, check_complete, source_shapes
from megatron_asvr.parallel.stored import Stored, compose

SETTINGS = {
    "vision_encoder": "vision",
    "language_model": "language",
    "visual_head": "visual_head",
    "projector": "projector",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Checked weights; calling it with one of our names gives that tensor or None.

    Attributes:
        path: where they are.
        kind: "llava", "text", "vision", "asvr-official" or "asvr".
        model: settings of a model with these parts; parts that are not here have the defaults.
        rules: our tensors and what they are made of, by our name.
        stored: the tensors on disk by the names of the rules.
        ignored: names on disk of tensors that the model does not need.
        missing: our names that are not here and were allowed to be missing.
    """

    path: Path
    kind: str
    model: ModelConfig
    rules: dict[str, Rule]
    stored: dict[str, Stored]
    ignored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Our names of all tensors that are here."""
        return list(self.rules)

    @property
    def language(self) -> LanguageConfig | None:
        """Settings of the language model, None without one."""
        return self.model.language if self.holds("language_model") else None

    @property
    def vision(self) -> VisionConfig | None:
        """Settings of the vision encoder, None without one."""
        return self.model.vision if self.holds("vision_encoder") else None

    @property
    def head(self) -> VisualHeadConfig | None:
        """Settings of the visual head, None without one."""
        return self.model.visual_head if self.holds("visual_head") else None

    def holds(self, part: str) -> bool:
        """Whether any tensor of ``part`` is here."""
        return any(name.startswith(f"{part}.") for name in self.rules)

    def __call__(self, name: str) -> Tensor | None:
        """The full tensor called ``name`` in the dtype on disk, or None when it is not here."""
        rule = self.rules.get(name)
        return None if rule is None else rule.join(lambda part: self.stored[part].read())

    def open(self, name: str) -> Stored:
        """The tensor called ``name``, joined from its parts while it is read.

        Raises:
            ConversionError: its parts have several types.
        """
        rule = self.rules[name]
        parts = {part: self.stored[part] for part, _ in rule.parts}
        fill = partial(_fill, rule, parts)
        return compose(rule.shape, self.dtype(name), fill, list(parts.values()), rule.layout.join)

    @property
    def weights(self) -> dict[str, Stored]:
        """All tensors by our name; see ``open``."""
        return {name: self.open(name) for name in self.rules}

    def dtype(self, name: str) -> torch.dtype:
        """Type of the tensor called ``name``.

        Raises:
            ConversionError: its parts have several.
        """
        found = {self.stored[part].dtype for part, _ in self.rules[name].parts}
        if len(found) > 1:
            raise ConversionError(f"{self.path}: the parts of {name} have several types: {found}")
        return found.pop()

    def check_fits(self, model: ModelConfig, parts: tuple[str, ...]) -> None:
        """Return when this folder's models compute what ``model`` says.

        Args:
            model: settings of the run.
            parts: parts of the model that are taken from this folder.

        Raises:
            ConversionError: a part is not here or a setting that changes its results differs.
        """
        for part in parts:
            if not self.holds(part):
                raise ConversionError(f"{self.path} ({self.kind}) holds no {part}")
            key = SETTINGS[part]
            found = differences(getattr(self.model, key), getattr(model, key))
            if found:
                shown = "; ".join(f"{k} is {a!r}, the run asks for {b!r}" for k, a, b in found)
                raise ConversionError(
                    f"{self.path}, {part}: {shown}. Take the settings from the folder"
                )


def _fill(rule: Rule, parts: dict[str, Stored], out: Tensor, start: int) -> None:
    for part, begin, place in rule.cut(start, start + out.numel()):
        parts[part].fill(out[place], begin)


def matched(
    path: Path,
    kind: str,
    model: ModelConfig,
    rules: Iterable[Rule],
    tensors: dict[str, Stored],
    *,
    ignored: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
) -> Source:
    """The source that ``rules`` make of ``tensors``, after both were found to fit exactly.

    Args:
        path: where the tensors are; for messages.
        kind: see ``Source``.
        model: see ``Source``.
        rules: of everything that must be there.
        tensors: by the names of the rules; the ones to ignore are gone already.
        ignored: names on disk of those.
        allow_missing: shell patterns of our names that need not be there.

    Raises:
        ConversionError: with the first offenders and the counts.
    """
    by_name = {rule.name: rule for rule in rules}
    missing = tuple(
        name
        for name, rule in by_name.items()
        if may_miss(name, allow_missing) and not any(part in tensors for part, _ in rule.parts)
    )
    for name in missing:
        del by_name[name]
    got = {name: stored.shape for name, stored in tensors.items()}
    check_complete(str(path), got, source_shapes(by_name.values()))
    return Source(
        path=path,
        kind=kind,
        model=model,
        rules=by_name,
        stored=tensors,
        ignored=tuple(ignored),
        missing=missing,
    )


def may_miss(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the shell ``patterns`` names the tensor ``name``."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def sort_out(
    path: Path, tensors: dict[str, Stored], known_as: Callable[[str], str | None]
) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """Tensors by the tables' names, and the names on disk of those that are not needed.

    Args:
        path: for messages.
        tensors: by name on disk.
        known_as: the tables' name of a name on disk; None when it is not needed.

    Raises:
        ConversionError: two names mean the same tensor.
    """
    found: dict[str, str] = {}
    ignored = []
    for name in tensors:
        known = known_as(name)
        if known is None:
            ignored.append(name)
        elif known in found:
            raise ConversionError(f"{path}: {name} and {found[known]} are the same tensor")
        else:
            found[known] = name
    return {known: tensors[name] for known, name in found.items()}, tuple(ignored)


def drop_tied_copy(path: Path, tensors: dict[str, Stored]) -> None:
    """Forget a saved copy of tied output embeddings, once it is proven to be a copy.

    Args:
        path: for messages.
        tensors: by the tables' names, of a model with tied embeddings.

    Raises:
        ConversionError: it is no copy.
    """
    copy = tensors.pop("language_model.lm_head.weight", None)
    original = tensors.get("language_model.model.embed_tokens.weight")
    if copy and original and not torch.equal(copy.read(), original.read()):
        raise ConversionError(
            f"{path}: config.json ties the embeddings (tie_word_embeddings), but the saved "
            "lm_head.weight differs from embed_tokens.weight; set tie_word_embeddings to false"
        )


def parts_of(names: Iterable[str]) -> tuple[str, ...]:
    """The model's parts that ``names`` belong to, in the model's order."""
    held = {name.partition(".")[0] for name in names}
    return tuple(part for part in PARTS if part in held)
