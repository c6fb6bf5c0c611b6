"""How many ranks share the model in which way: arithmetic only."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_asvr.config.layout import data_parallel
from megatron_asvr.config.schema import Config
from megatron_asvr.parallel.stages import layer_split


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelPlan:
    """Degrees whose product is the world.

    Attributes:
        tp: ranks that share each matrix (tensor parallel).
        pp: pipeline stages.
        vpp: model chunks per stage, None for one.
        stages: layers of the language model in chunk v * pp + r, the v-th of stage r; empty: the
            same number in each.
        head_alone: the last chunk holds the visual head and nothing else; the LM head stands at the
            end of the chunk before.
        cp: ranks that share each sequence (context parallel).
        dp: copies of the model (data parallel).
        sp: norms and dropout are split along the sequence over the tp ranks.
        ep: ranks that share the experts of a mixture; they are among the tp x cp x dp ranks of a
            stage.
        world: number of ranks.
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    stages: tuple[int, ...] = ()
    head_alone: bool = False
    cp: int = 1
    dp: int = 1
    sp: bool = False
    ep: int = 1
    world: int = 1

    def describe(self) -> str:
        """One line for a person."""
        parts = [f"TP{self.tp}", f"PP{self.pp}", f"CP{self.cp}", f"DP{self.dp}"]
        if self.vpp:
            parts.append(f"VPP{self.vpp}")
        if self.sp:
            parts.append("SP")
        if self.ep > 1:
            parts.append(f"EP{self.ep}")
        return " x ".join(parts) + f" = {self.world} ranks"


def make_plan(config: Config, world_size: int, codebook_sizes: Sequence[int] = ()) -> ParallelPlan:
    """The plan of ``world_size`` ranks: what the model does not take becomes data parallel.

    Args:
        config: the run, checked.
        world_size: number of ranks.
        codebook_sizes: codes of every depth of the visual head, if there is one; with pipeline
            stages their layers depend on it.

    Raises:
        ConfigError: the world is not a multiple of the ranks that hold the model.
    """
    p, split = config.parallel, layer_split(config, codebook_sizes)
    return ParallelPlan(
        tp=p.tp,
        pp=p.pp,
        vpp=p.vpp,
        stages=split.layers,
        head_alone=split.head_alone,
        cp=p.cp,
        dp=data_parallel(p, world_size),
        sp=p.sp,
        ep=p.ep,
        world=world_size,
    )


def layout_lines(config: Config, world_size: int, codebook_sizes: Sequence[int]) -> list[str]:
    """The layout in words: its degrees, what each pipeline stage holds, how even that is.

    The arguments are those of ``make_plan``.
    """
    plan = make_plan(config, world_size, codebook_sizes)
    lines = [f"layout: {plan.describe()}"]
    if plan.pp == 1:
        return lines
    split = layer_split(config, codebook_sizes)
    for stage, cost in enumerate(split.costs):
        chunks = " + ".join(str(number) for number in split.layers[stage :: plan.pp])
        lines.append(f"stage {stage}: {chunks} layers, {cost / sum(split.costs):.1%} of the cost")
    heads = "the last the LM head and the visual head"
    if split.head_alone:
        heads = "the last chunk the visual head alone, the one before it the LM head"
    lines.append(
        f"imbalance of the stages: {split.imbalance:.3f} (largest modelled cost over the mean; the "
        f"first has the encoder, {heads})"
    )
    if config.data.packing:
        return lines  # how many sequences the samples fill is known step by step
    number = config.train.global_batch // (plan.dp * config.train.micro_batch)
    empty = -number % plan.pp if plan.vpp else 0
    lines.append(
        f"bubble: a stage is idle for {split.idle(number, plan.vpp or 1):.1%} of a step's passes, "
        f"by the same model, with {number} micro-batches of equal size"
    )
    if empty:
        lines.append(
            f"micro-batches: {number} a step, and {empty} empty ones, because virtual stages take "
            f"a multiple of parallel.pp={plan.pp}"
        )
    return lines
