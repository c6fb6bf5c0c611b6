"""Two measurements of one step, laid side by side: what agrees, and where they part.

A measurement is a folder: the safetensors file of each trained parameter's full gradient, the
probes of every rank, and ``Facts`` that the ranks returned. Gradients are read one at a time.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_asvr.train.probes import CODES, TEXT_TARGETS, compare_probes, read_probes

GRADIENT_FLOOR = 1e-3  # of the whole gradient's norm: smaller gradients are compared with this
WORST = 5  # parameters listed


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """Bounds for a layout to pass.

    Attributes:
        loss: relative, of losses.
        norm: relative, of the global gradient norm, summed here in fp64.
        clip: relative, of the same norm as the optimizer computes it for clipping.
        gradient: of ||g - g'|| / max(||g||, floor of the whole gradient's norm), per parameter.
        turn: 1 - cosine of the whole gradients.
        output: of a module's output, relative to its length at a position.
    """

    loss: float
    norm: float
    clip: float
    gradient: float
    turn: float
    output: float


TOLERANCES = {
    # The optimizer sums its norm in fp32, in an order that depends on the layout: measured 1.2e-6
    # with 8 M parameters.
    "fp32": Tolerance(loss=1e-6, norm=1e-6, clip=1e-4, gradient=1e-5, turn=1e-6, output=1e-4),
    # Rounding of bf16 alone: parameters are judged together, by the cosine.
    "bf16": Tolerance(loss=5e-3, norm=2e-2, clip=2e-2, gradient=math.inf, turn=1e-3, output=0.2),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What the ranks of one run found.

    Attributes:
        losses: joint, text and visual loss of the global batch.
        targets: text and visual targets in it.
        grad_norm: global gradient norm, as the optimizer computes it.
        divisors: on every rank, the text and visual counts it divided by, and who it is.
        parameters: trained parameters in the order in which the backward pass completes them.
        collectives: findings about the schedule of collectives; None when not recorded.
        num_collectives: how many all ranks issued.
    """

    losses: Mapping[str, float]
    targets: Mapping[str, int]
    grad_norm: float
    divisors: Sequence[tuple[str, Mapping[str, int]]]
    parameters: Sequence[str]
    collectives: Sequence[str] | None = None
    num_collectives: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One run's facts and the folder with its gradients and probes."""

    facts: Facts
    folder: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table: two numbers, how far apart they are and may be."""

    name: str
    reference: float | None
    layout: float | None
    difference: float
    bound: float
    ok: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the comparison came to.

    Attributes:
        ok: everything agrees.
        rows: the table.
        worst: the parameters whose gradients differ most, with their relative errors.
        places: where the runs part, in words; empty when everything agrees.
    """

    ok: bool
    rows: list[Row]
    worst: list[tuple[str, float]]
    places: list[str]


def save_gradient(folder: Path, name: str, gradient: Tensor) -> None:
    """Write one parameter's full gradient."""
    save_file({"gradient": gradient.contiguous()}, folder / f"{name}.safetensors")


def judge(
    reference: Measurement, layout: Measurement, *, precision: str, samples: Sequence[str]
) -> Verdict:
    """Whether a layout computes what one rank computes, and where it does not.

    Args:
        reference: of one rank.
        layout: of the layout.
        precision: whose tolerances hold.
        samples: ids of the global batch's samples, as the probes count them.
    """
    bounds, found = TOLERANCES[precision], _Findings()
    _judge_counts(reference.facts, layout.facts, found)
    same_outputs = _judge_outputs(reference, layout, bounds, samples, found)
    _judge_losses(reference.facts, layout.facts, bounds, found)
    worst = _judge_gradients(reference, layout, bounds, found, name_place=same_outputs)
    if layout.facts.collectives is not None:
        findings = layout.facts.collectives
        found.row("collectives", None, layout.facts.num_collectives, len(findings), 0)
        found.places += [f"collectives differ: {finding}" for finding in findings]
    return Verdict(
        ok=all(row.ok for row in found.rows) and not found.places,
        rows=found.rows,
        worst=worst,
        places=found.places,
    )


@dataclass(slots=True)
class _Findings:
    rows: list[Row] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    def row(
        self,
        name: str,
        reference: float | None,
        layout: float | None,
        difference: float,
        bound: float,
    ) -> bool:
        ok = difference <= bound  # False for NaN
        self.rows.append(
            Row(
                name=name,
                reference=reference,
                layout=layout,
                difference=difference,
                bound=bound,
                ok=ok,
            )
        )
        return ok


def _judge_counts(reference: Facts, layout: Facts, found: _Findings) -> None:
    """Targets of the global batch, and what each rank divided its losses by."""
    for kind, number in reference.targets.items():
        got = layout.targets[kind]
        if not found.row(f"{kind} targets", number, got, abs(got - number), 0):
            found.places.append(f"the layout counts {got} {kind} targets, one rank {number}")
        wrong = [(who, used[kind]) for who, used in layout.divisors if used[kind] != number]
        if wrong:
            who, used = wrong[0]
            more = f", and {len(wrong) - 1} more ranks" if len(wrong) > 1 else ""
            found.places.append(
                f"wrong denominator of the {kind} loss: {who} divides by {used}{more}; the global "
                f"batch has {number} {kind} targets"
            )


def _judge_outputs(
    reference: Measurement,
    layout: Measurement,
    bounds: Tolerance,
    samples: Sequence[str],
    found: _Findings,
) -> bool:
    """Outputs of every module, and the first that differs."""
    outputs = compare_probes(read_probes(reference.folder), read_probes(layout.folder))
    largest = max((output.error for output in outputs), default=0.0)
    ok = found.row("outputs of modules", None, None, largest, bounds.output)
    # What goes in is named before what comes out of the modules that it goes into.
    outputs.sort(key=lambda output: output.name not in (TEXT_TARGETS, CODES))
    first = next((output for output in outputs if not output.error <= bounds.output), None)
    if first is not None:
        at = f"sample {samples[first.sample]}, position {first.place}, depth {first.depth}"
        found.places.append(
            f"the first output that differs is {first.name} ({at}, tensor-parallel rank "
            f"{first.tp_rank}): relative error {first.error:.1e}"
        )
    return ok


def _judge_losses(reference: Facts, layout: Facts, bounds: Tolerance, found: _Findings) -> None:
    """Each loss, and their sum."""
    agree = {
        name: found.row(name, value, got, _relative(value, got), bounds.loss)
        for name, value in reference.losses.items()
        for got in [layout.losses[name]]
    }
    if not agree["loss"] and all(ok for name, ok in agree.items() if name != "loss"):
        found.places.append(
            "each loss agrees but their sum does not: it is weighted or divided differently"
        )


def _judge_gradients(
    reference: Measurement,
    layout: Measurement,
    bounds: Tolerance,
    found: _Findings,
    *,
    name_place: bool,
) -> list[tuple[str, float]]:
    """Every parameter's gradient; the worst ones."""
    parts = list(_gradients(reference, layout))
    norms = [math.sqrt(sum(part.squares[i] for part in parts)) for i in (0, 1)]
    dot = sum(part.dot for part in parts)
    floor = GRADIENT_FLOOR * norms[0]
    errors = {part.name: part.error(floor) for part in parts}
    # A dict keeps the order of the backward pass; NaN counts as worst.
    worst = sorted(errors.items(), key=lambda item: -math.inf if item[1] != item[1] else -item[1])
    largest = worst[0][1] if worst else 0.0
    clip = [run.facts.grad_norm for run in (reference, layout)]
    found.row("gradient norm", *norms, _relative(*norms), bounds.norm)
    found.row("the optimizer's norm", *clip, _relative(*clip), bounds.clip)
    found.row("worst gradient", None, None, largest, bounds.gradient)
    cosine = dot / (norms[0] * norms[1]) if norms[0] and norms[1] else float(norms[0] == norms[1])
    same_way = found.row("1 - gradient cosine", None, None, abs(1 - cosine), bounds.turn)
    wrong = [name for name, error in errors.items() if not error <= bounds.gradient]
    if name_place and (wrong or not same_way):
        name, kind = (wrong[0], "first wrong") if wrong else (worst[0][0], "worst")
        found.places.append(
            f"outputs agree and gradients do not: the {kind} one of the backward pass is {name} "
            f"(relative error {errors[name]:.1e}); {len(wrong)} of {len(errors)} are wrong"
        )
    return worst[:WORST]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gradient:
    """Sums of one parameter's gradients g (reference) and g'."""

    name: str
    squares: tuple[float, float]
    dot: float
    distance: float

    def error(self, floor: float) -> float:
        """Relative to the gradient's norm, or to ``floor`` where that is larger."""
        scale = max(math.sqrt(self.squares[0]), floor)
        return self.distance / scale if scale else (0.0 if self.distance == 0 else math.inf)


def _gradients(reference: Measurement, layout: Measurement) -> Iterator[_Gradient]:
    """Compare one parameter after the other."""
    for name in reference.facts.parameters:
        files = [run.folder / f"{name}.safetensors" for run in (reference, layout)]
        g = load_file(files[0])["gradient"].double()
        other = load_file(files[1])["gradient"].double() if files[1].exists() else g * math.nan
        yield _Gradient(
            name=name,
            squares=(float(g.square().sum()), float(other.square().sum())),
            dot=float((g * other).sum()),
            distance=float(torch.linalg.vector_norm(g - other)),
        )


def _relative(want: float, got: float) -> float:
    """Difference relative to ``want``; the difference itself where that is 0."""
    return abs(got - want) / (abs(want) or 1.0)


def plain(value: Any) -> Any:
    """``value`` for JSON: numbers that are not finite become None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
