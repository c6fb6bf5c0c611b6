"""What every rank of a run needs at its peak: state, and micro-batches in flight."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_asvr.config.layout import data_parallel
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import ConfigError
from megatron_asvr.model.tokenizer import TokenizerConfig
from megatron_asvr.planner.rehearsal import Layers, Shape, largest
from megatron_asvr.planner.shards import Chunk, stages
from megatron_asvr.planner.state import State, state


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """The peak of the ranks of one pipeline stage, in bytes.

    Attributes:
        stage: of the pipeline.
        ranks: number of its ranks.
        layers: of the language model.
        in_flight: micro-batches (of a chunk) whose activations exist at once.
        state: weights, gradients and optimizer.
        kept: by all micro-batches in flight, from their forward to their backward passes.
        forward: beside these at the peak of a forward pass, logits included.
        backward: beside these at the peak of a backward pass.
    """

    stage: int
    ranks: int
    layers: int
    in_flight: int
    state: State
    kept: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        """The most that exists at once."""
        return self.state.total + self.kept + max(self.forward, self.backward)


def plan_memory(
    config: Config,
    world: int,
    tokenizer: TokenizerConfig | None,
    *,
    shape: Shape | None = None,
    layers: Layers | None = None,
    joined: bool = False,
) -> list[RankMemory]:
    """The peak of every pipeline stage's ranks, in the forward and backward passes of a step.

    The ranks of a stage differ by their share of the optimizer's padding at most; the one with the
    most of it is told.

    Args:
        config: the run, checked.
        world: number of ranks.
        tokenizer: what the visual tokenizer quantises; None without a visual loss.
        shape: of the micro-batches; by default the largest.
        layers: who computes them; by default those of a GPU.
        joined: the tokenizer's encoder is the model's (``model.images.one_pass``).

    Raises:
        ConfigError: a mixture of experts, whose activations depend on where tokens go.
        LaunchError: this process is a rank of a job.
    """
    if config.model.language.is_mixture:
        raise ConfigError(
            f"model.language.family={config.model.language.family}: the activations of a mixture "
            "of experts depend on where its tokens go, which no plan knows; plan its dense parts "
            "with another family"
        )
    micro_batch = shape or largest(config), layers or layers_on_gpu(config)
    every = stages(config, world, tokenizer, micro_batch=micro_batch, joined=joined)
    return [_rank(config, world, number, chunks) for number, chunks in enumerate(every)]


def layers_on_gpu(config: Config) -> Layers:
    """Who computes the layers on a GPU with Transformer Engine; see ``precision``."""
    local = config.precision.backend == "local" or config.precision.fp8.emulate
    return "local" if local or config.train.precision == "fp32" else "te"


def passes(config: Config, world: int, stage: int) -> Counter[int]:
    """How often each chunk of a stage has run forward, but not backward, at the most.

    Source: megatron-core, pipeline_parallel/schedules.py: a stage warms up with as many
    micro-batches as stages follow; interleaved, with two for each of them and a round of ``pp`` for
    each chunk but the last. Then every forward pass is followed by a backward pass.

    Args:
        config: the run, checked.
        world: number of ranks.
        stage: of the pipeline.
    """
    p, t = config.parallel, config.train
    chunks, following = p.vpp or 1, p.pp - stage - 1
    most = following + 1 if chunks == 1 else following * 2 + (chunks - 1) * p.pp + 1
    # A packed step has as many micro-batches as its samples fill: enough, then.
    if not config.data.packing:
        number = t.global_batch // (data_parallel(p, world) * t.micro_batch)
        rounds = -(-number // p.pp) * p.pp if chunks > 1 else number  # filled with empty ones
        most = min(most, rounds * chunks)
    return Counter(place // p.pp % chunks for place in range(most))


def _rank(config: Config, world: int, stage: int, chunks: Sequence[Chunk]) -> RankMemory:
    flights = passes(config, world, stage)
    return RankMemory(
        stage=stage,
        ranks=world // config.parallel.pp,
        layers=sum(chunk.layers for chunk in chunks),
        in_flight=sum(flights.values()),
        state=state(chunks, config, world),
        kept=sum(flights[number] * chunk.passes.kept for number, chunk in enumerate(chunks)),
        forward=max(chunk.passes.forward for chunk in chunks),
        backward=max(chunk.passes.backward for chunk in chunks),
    )
