"""Which linears multiply in 8 bits: all that can be named, but those that a pattern excludes.

The encoder and the visual tokenizer are never named, nor are norms, embeddings, attention's own
products (whose operands have no weight to be scaled beside them) and the router of a mixture.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_asvr.config.schema import Fp8Config
from megatron_asvr.errors import ConfigError
from megatron_asvr.precision.fp8.shapes import width_problem

_LAYER = re.compile(r"(.*\.layers\.)(\d+)(\..*)")
_IN_A_LAYER = "language_model.decoder.layers."
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear as one rank has it.

    Attributes:
        name: canonical: the path of its weight in the model.
        inputs: width of its input.
        outputs: width of its output.
    """

    name: str
    inputs: int
    outputs: int


def decide(linears: Sequence[Linear], settings: Fp8Config) -> dict[str, str | None]:
    """For each linear the pattern that keeps it out of 8 bits, or None.

    Args:
        linears: of the model.
        settings: recipe and patterns.

    Raises:
        ConfigError: a pattern fits nothing or a weight that is kept in 8 bits, or the recipe
            cannot multiply what is left.
    """
    if settings.recipe == "none":
        return {linear.name: "precision.fp8.recipe=none" for linear in linears}
    forms = _forms([linear.name for linear in linears])
    unused = set(settings.exclude)
    decided: dict[str, str | None] = {}
    for name, ways in forms.items():
        fitting = [p for p in settings.exclude if any(fnmatchcase(way, p) for way in ways)]
        unused -= set(fitting)
        decided[name] = fitting[0] if fitting else None
    if unused:
        pattern = min(unused)
        near = difflib.get_close_matches(pattern, forms, n=1, cutoff=0.3)
        raise ConfigError(
            f"precision.fp8.exclude has {pattern!r}, which fits no linear of the model"
            + (f" (nearest: {near[0]})" if near else "")
            + "; `asvr train ... --dry-run` lists them all"
        )
    _check_kept_weights(decided, settings)
    _check_widths([x for x in linears if decided[x.name] is None], settings)
    return decided


def describe(linears: Sequence[Linear], decided: dict[str, str | None], base: str) -> list[str]:
    """Lines for a person: what multiplies in how many bits, equal neighbours together.

    Args:
        linears: of the model.
        decided: from ``decide``.
        base: what those that are kept out multiply in.
    """
    rows: dict[tuple[str, int, int, str | None], list[str]] = {}
    for x in linears:
        kind = re.sub(r"\.\d+(?=\.|$)", ".*", x.name)
        rows.setdefault((kind, x.inputs, x.outputs, decided[x.name]), []).append(x.name)
    lines = []
    for (_, inputs, outputs, pattern), names in rows.items():
        which = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"
        how = "fp8" if pattern is None else f"{base} ({pattern})"
        lines.append(f"{which}: {inputs} -> {outputs} a rank, {how}")
    return lines


def _forms(names: Iterable[str]) -> dict[str, list[str]]:
    """Each name with its ways to be written: layers also count from the end, ``layers.-1.``."""
    names = list(names)
    number: dict[str, int] = {}
    for name in names:
        if found := _LAYER.match(name):
            number[found[1]] = max(number.get(found[1], 0), int(found[2]) + 1)
    forms = {}
    for name in names:
        forms[name] = [name]
        if found := _LAYER.match(name):
            before, layer, after = found.groups()
            forms[name].append(f"{before}{int(layer) - number[before]}{after}")
    return forms


def _check_kept_weights(decided: dict[str, str | None], settings: Fp8Config) -> None:
    """Refuse to keep out of 8 bits what holds its weight in them."""
    out = [name for name, pattern in decided.items() if pattern and _IN_A_LAYER in name]
    if settings.weights and out:
        raise ConfigError(
            f"precision.fp8.weights=true keeps the weights of all layers in 8 bits, and "
            f"precision.fp8.exclude names {len(out)} of them, for example {out[0]}; leave one out"
        )


def _check_widths(linears: Sequence[Linear], settings: Fp8Config) -> None:
    """Refuse widths that the recipe cannot multiply, all at once."""
    found: dict[str, list[str]] = {}
    for x in linears:
        problem = width_problem(settings.recipe, inputs=x.inputs, outputs=x.outputs)
        if problem is not None:
            found.setdefault(problem, []).append(x.name)
    if found:
        named = [
            f"{', '.join(names[:_SHOWN])}{' and more' if len(names) > _SHOWN else ''} with {why}"
            for why, names in found.items()
        ]
        raise ConfigError(
            f"precision.fp8.recipe={settings.recipe} cannot multiply {'; '.join(named)}. Name them "
            "in precision.fp8.exclude, or choose other widths or another parallel.tp"
        )
