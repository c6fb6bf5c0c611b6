"""The process groups of a rank, made once by megatron-core and passed on by hand from here."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron)

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from megatron_asvr.errors import LaunchError
from megatron_asvr.parallel.plan import ParallelPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """This rank's place in the plan and the groups it belongs to.

    Attributes:
        plan: the degrees.
        rank: this rank in the world.
        tp_rank: its place among the ranks that share matrices; likewise the next three.
        tp: ranks that share matrices.
        dp: ranks with the same share of the model and other samples.
        pp: ranks with the other stages of the same model copy.
        cp: ranks with the other parts of the same sequences.
        dp_cp: ``dp`` and ``cp`` together: what gradients are summed over.
        tp_cp: ``tp`` and ``cp`` together: the ranks of a stage that see the same samples.
        tp_cp_dp: all ranks of a stage.
        ep: ranks of a stage that hold the other experts.
        expert_dp: ranks of a stage that hold the same experts: what their gradients are summed
            over.
        world: all ranks.
    """

    plan: ParallelPlan
    rank: int
    tp_rank: int
    dp_rank: int
    pp_rank: int
    cp_rank: int
    tp: ProcessGroup
    dp: ProcessGroup
    pp: ProcessGroup
    cp: ProcessGroup
    dp_cp: ProcessGroup
    tp_cp: ProcessGroup
    tp_cp_dp: ProcessGroup
    ep: ProcessGroup
    expert_dp: ProcessGroup
    world: ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens and images."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the visual loss."""
        return self.pp_rank == self.plan.pp - 1

    @property
    def has_text_loss(self) -> bool:
        """Whether this rank computes the text loss: the last stage, or the one before it."""
        return self.pp_rank == self.plan.pp - 1 - self.plan.head_alone


def initialize(
    plan: ParallelPlan, timeout_s: float = 600.0, *, seed: int = 0, gloo: bool = True
) -> Groups:
    """The groups of this rank; every rank of the world must call it with the same plan.

    Args:
        plan: degrees; ``plan.world`` must be the size of the initialised default group.
        timeout_s: how long a collective may wait for the other ranks; rounded up to minutes.
        seed: start of megatron-core's random states (dropout; weights have their own).
        gloo: make megatron-core's second groups as well; not where groups carry nothing.

    Raises:
        LaunchError: torch.distributed is not initialised, or with another number of ranks.
    """
    if not dist.is_initialized():
        raise LaunchError(
            "torch.distributed is not initialised; start ranks with launch.local.run_ranks or "
            "call launch.job.init_rank first"
        )
    if dist.get_world_size() != plan.world:
        raise LaunchError(f"the plan has {plan.world} ranks, the job {dist.get_world_size()}")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=plan.tp,
        pipeline_model_parallel_size=plan.pp,
        virtual_pipeline_model_parallel_size=plan.vpp,
        context_parallel_size=plan.cp,
        # Experts are shared out whole: their matrices are not split over the tp ranks.
        expert_model_parallel_size=plan.ep,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
        create_gloo_process_groups=gloo,
        # Where the two copies of a tied weight are: with the embedding and with the LM head.
        get_embedding_ranks=lambda ranks: sorted({ranks[0], ranks[-1 - plan.head_alone]}),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Groups(
        plan=plan,
        rank=dist.get_rank(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        tp=parallel_state.get_tensor_model_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        tp_cp=parallel_state.get_tensor_and_context_parallel_group(),
        tp_cp_dp=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        ep=parallel_state.get_expert_model_parallel_group(),
        expert_dp=parallel_state.get_expert_data_parallel_group(),
        world=dist.group.WORLD,
    )


def destroy() -> None:
    """Forget the groups, so that ``initialize`` can be called again; the default group stays."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


@contextlib.contextmanager
def imagined(plan: ParallelPlan, rank: int) -> Iterator[Groups]:
    """The groups of one rank of a world that is not there: modules can be built, nothing is sent.

    Args:
        plan: degrees.
        rank: which rank.

    Raises:
        LaunchError: this process is a rank of a real world.
    """
    if dist.is_initialized():
        raise LaunchError("this process is a rank of a job; plan in a process of its own")
    # Registers the backend too; it is torch's own, but under a name of its tests.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.world)
    try:
        yield initialize(plan, gloo=False)
    finally:
        destroy()
        dist.destroy_process_group()
