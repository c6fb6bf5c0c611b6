"""Can the model be laid out over the ranks? All problems at once, each with what would work."""

import math
from collections.abc import Iterator
from dataclasses import replace

from megatron_asvr.config.schema import Config, ParallelConfig
from megatron_asvr.errors import ConfigError


def check_layout(config: Config, world: int | None = None) -> None:
    """Return when the layout can work.

    Args:
        config: a run whose other settings are possible.
        world: number of ranks; None checks what does not depend on it.

    Raises:
        ConfigError: every problem, a single one on one line.
    """
    problems = list(_degrees(config.parallel))
    if problems:  # the others are looked for as if these degrees were 1
        config, world = replace(config, parallel=_possible(config.parallel)), None
    for found in (_pipeline, _head_alone, _tensor, _experts, _sequence, _official):
        problems += found(config)
    if world is not None:
        problems += _world(config, world)
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        listed = "".join(f"\n- {problem}" for problem in problems)
        raise ConfigError(f"the layout has {len(problems)} problems:{listed}")


def data_parallel(p: ParallelConfig, world: int) -> int:
    """How many copies of the model ``world`` ranks hold.

    Raises:
        ConfigError: ``world`` is not a multiple of the ranks that hold one copy.
    """
    model = p.tp * p.pp * p.cp
    if world < 1 or world % model:
        raise ConfigError(
            f"parallel.tp={p.tp} x pp={p.pp} x cp={p.cp} needs a multiple of {model} ranks, got "
            f"{world}; use {model}, {2 * model}, {3 * model}, ... ranks or smaller degrees"
        )
    return world // model


def can_stand_alone(config: Config) -> bool:
    """Whether the visual head can have the last pipeline stage, or chunk, to itself."""
    return not list(_against_alone(config))


def divisors(*numbers: int) -> str:
    """The numbers that divide all of ``numbers``, for a message."""
    common = math.gcd(*numbers)
    return ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)


def _degrees(p: ParallelConfig) -> Iterator[str]:
    for name in ("tp", "pp", "cp", "ep"):
        if getattr(p, name) < 1:
            yield f"parallel.{name}={getattr(p, name)} must be at least 1"
    if p.vpp is not None and p.vpp < 2:
        yield f"parallel.vpp={p.vpp} must be at least 2; leave it unset for one chunk a stage"


def _possible(p: ParallelConfig) -> ParallelConfig:
    vpp = p.vpp if p.vpp is None or p.vpp > 1 else None
    return replace(p, tp=max(p.tp, 1), pp=max(p.pp, 1), cp=max(p.cp, 1), ep=max(p.ep, 1), vpp=vpp)


def _pipeline(config: Config) -> Iterator[str]:
    p, num_layers = config.parallel, config.model.language.num_layers
    if p.vpp is not None and p.pp < 2:
        yield f"parallel.vpp={p.vpp} needs parallel.pp >= 2, got {p.pp}; leave vpp unset"
    chunks = p.pp * (p.vpp or 1)
    name = f"parallel.pp={p.pp}" + (f" x vpp={p.vpp}" if p.vpp else "")
    if p.stages is None:
        if chunks > num_layers:
            yield (
                f"{name} makes {chunks} chunks of model.language.num_layers={num_layers} layers; "
                f"use a product of at most {num_layers}, or give parallel.stages, where 0 is "
                "allowed"
            )
        return
    stages = list(p.stages)
    if len(stages) != chunks or sum(stages) != num_layers or min(stages, default=0) < 0:
        yield (
            f"parallel.stages={stages} has {len(stages)} numbers with the sum {sum(stages)}; "
            f"{name} and model.language.num_layers={num_layers} need {chunks} numbers, none "
            f"negative, with the sum {num_layers}"
        )


def _head_alone(config: Config) -> Iterator[str]:
    p = config.parallel
    if p.head_alone:
        reasons = list(_against_alone(config))
        if p.stages and p.stages[-1]:
            reasons.append(f"parallel.stages={list(p.stages)} must end with 0")
        for reason in reasons:
            yield f"parallel.head_alone=true: {reason}; or leave head_alone unset"


def _against_alone(config: Config) -> Iterator[str]:
    if config.parallel.pp < 2:
        yield f"needs parallel.pp >= 2, got {config.parallel.pp}"
    if not config.loss.visual_weight:
        yield "needs a visual head, and loss.visual_weight=0 has none"
    if config.model.language.tied_embeddings and config.parallel.pp == 2 and config.parallel.vpp:
        # megatron-core sums a tied weight's gradients over two stages, not over two chunks of one.
        yield (
            "needs parallel.pp >= 3 or no parallel.vpp with model.language.tied_embeddings=true: "
            "the LM head would be on the stage of the embedding, in another chunk"
        )


def _tensor(config: Config) -> Iterator[str]:
    p, model = config.parallel, config.model
    lm = model.language
    sizes = {
        "language.num_heads": lm.num_heads,
        "language.num_kv_heads": lm.kv_heads,
        "language.hidden_size": lm.hidden_size,
    }
    if not lm.is_mixture:  # experts are never divided
        sizes["language.ffn_hidden_size"] = lm.ffn_hidden_size
    if config.loss.visual_weight:
        sizes["visual_head.width"] = model.visual_head.width
    wrong = [f"model.{name}={size}" for name, size in sizes.items() if size % p.tp]
    if wrong:
        yield (
            f"parallel.tp={p.tp} does not divide {', '.join(wrong)}; "
            f"use {divisors(*sizes.values())}"
        )
    if p.sp and p.tp == 1:
        yield "parallel.sp=true needs parallel.tp > 1, got 1; set sp=false"


def _experts(config: Config) -> Iterator[str]:
    p, lm = config.parallel, config.model.language
    if not lm.is_mixture:
        if p.ep > 1:
            yield (
                f"parallel.ep={p.ep} shares out experts, and model.language.family={lm.family} "
                "has none; use ep=1"
            )
        return
    experts = lm.num_experts or 1
    if experts % p.ep:
        yield (
            f"parallel.ep={p.ep} does not divide model.language.num_experts={experts}; "
            f"use {divisors(experts)}"
        )
    if p.tp > 1 and not p.sp:
        yield f"parallel.tp={p.tp} with experts needs sequence parallelism; set parallel.sp=true"


def _sequence(config: Config) -> Iterator[str]:
    p, d = config.parallel, config.data
    if not d.packing or d.pack_length is None:
        return  # rows are padded to what the layout needs
    length = d.pack_length
    if length < d.max_length:
        yield (
            f"data.pack_length={length} is shorter than a sample may be, "
            f"data.max_length={d.max_length}; use at least that"
        )
    multiple = (2 * p.cp if p.cp > 1 else 1) * (p.tp if p.sp else 1)
    if length % multiple:
        fits = -(-max(length, d.max_length) // multiple) * multiple
        reason = " x ".join(["2 x cp"] * (p.cp > 1) + ["tp"] * p.sp)
        yield (
            f"data.pack_length={length} is not a multiple of {reason} = {multiple}; "
            f"use {fits}" + (f" or {fits - multiple}" if fits - multiple >= d.max_length else "")
        )


def _official(config: Config) -> Iterator[str]:
    if config.loss.mode != "official":
        return
    for name, got, want in (
        ("parallel.pp", config.parallel.pp, 1),
        ("parallel.cp", config.parallel.cp, 1),
        ("data.packing", config.data.packing, False),
    ):
        if got != want:
            yield (
                f"loss.mode='official' takes means per micro-batch, so {name} must be "
                f"{str(want).lower()}, got {str(got).lower()}; or use loss.mode=exact"
            )


def _world(config: Config, world: int) -> Iterator[str]:
    p, t = config.parallel, config.train
    try:
        dp = data_parallel(p, world)
    except ConfigError as error:
        yield str(error)
        return
    per_stage = world // p.pp
    if per_stage % p.ep:
        yield (
            f"parallel.ep={p.ep} does not divide the {per_stage} ranks of a pipeline stage; use a "
            f"divisor of them ({divisors(per_stage)})"
        )
    share = dp * t.micro_batch
    if not config.data.packing and t.global_batch % share:
        yield (
            f"train.global_batch={t.global_batch} is not a multiple of data-parallel size {dp} x "
            f"train.micro_batch={t.micro_batch}; use a multiple of {share}"
        )
    if config.loss.mode == "official" and dp > 1:
        yield (
            f"loss.mode='official' takes means per micro-batch, so it is defined for one "
            f"data-parallel rank only; got {dp}. Use loss.mode=exact, or {world // dp} ranks"
        )
