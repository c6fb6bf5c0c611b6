"""How many ranks share the model in which way: arithmetic only."""

from dataclasses import dataclass

from megatron_asvr.config.schema import ParallelConfig
from megatron_asvr.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelPlan:
    """Degrees whose product is the world.

    Attributes:
        tp: ranks that share each matrix (tensor parallel).
        pp: pipeline stages.
        vpp: model chunks per stage, None for one.
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
    cp: int = 1
    dp: int = 1
    sp: bool = False
    ep: int = 1
    world: int = 1

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp * self.cp

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


def make_plan(config: ParallelConfig, world_size: int) -> ParallelPlan:
    """The plan of ``world_size`` ranks: what the model does not take becomes data parallel.

    Raises:
        ConfigError: a degree is impossible by itself, or the world does not divide.
    """
    for name in ("tp", "pp", "cp"):
        if getattr(config, name) < 1:
            raise ConfigError(f"parallel.{name}={getattr(config, name)} must be at least 1")
    if world_size < 1:
        raise ConfigError(f"a world of {world_size} ranks is impossible; use at least 1")
    if config.vpp is not None and (config.pp < 2 or config.vpp < 2):
        raise ConfigError(
            f"parallel.vpp={config.vpp} needs parallel.pp >= 2 (got {config.pp}) and at least 2 "
            "chunks; leave it unset otherwise"
        )
    if config.sp and config.tp < 2:
        raise ConfigError(
            f"parallel.sp=true needs parallel.tp >= 2 (got {config.tp}); set sp=false"
        )
    model = config.tp * config.pp * config.cp
    if world_size % model:
        fits = ", ".join(str(model * k) for k in (1, 2, 4))
        raise ConfigError(
            f"parallel.tp={config.tp} x pp={config.pp} x cp={config.cp} needs a multiple of "
            f"{model} ranks, got {world_size}; use {fits}, ... ranks or smaller degrees"
        )
    return ParallelPlan(
        tp=config.tp,
        pp=config.pp,
        vpp=config.vpp,
        cp=config.cp,
        dp=world_size // model,
        sp=config.sp,
        ep=config.ep,
        world=world_size,
    )
