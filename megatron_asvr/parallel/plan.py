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
