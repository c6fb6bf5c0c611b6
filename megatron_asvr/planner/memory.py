"""What every rank of a run needs at its peak: state, activations."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_asvr.config.layout import data_parallel
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import ConfigError
from megatron_asvr.model.tokenizer import TokenizerConfig
from megatron_asvr.planner.activations import Activations, Shape, largest
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
        layer_activations: kept by layers, encoder and projector, of all micro-batches in flight.
        losses: beside these while the losses are computed: what they keep, gradients of output
            layers, and logits of one chunk; or the encoder's layer that computes.
        backward: beside these while a layer's backward pass runs; the losses are gone by then.
    """

    stage: int
    ranks: int
    layers: int
    in_flight: int
    state: State
    layer_activations: int
    losses: int
    backward: int

    @property
    def peak(self) -> int:
        """The most that exists at once."""
        return self.state.total + self.layer_activations + max(self.losses, self.backward)


def plan_memory(
    config: Config,
    world: int,
    tokenizer: TokenizerConfig | None,
    *,
    shape: Shape | None = None,
) -> list[RankMemory]:
    """The peak of every pipeline stage's ranks, in the forward and backward passes of a step.

    The ranks of a stage differ by their share of the optimizer's padding at most; the one with the
    most of it is told.

    Args:
        config: the run, checked.
        world: number of ranks.
        tokenizer: what the visual tokenizer quantises; None without a visual loss.
        shape: of the micro-batches; by default the largest.

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
    kept = Activations(
        config=config,
        shape=shape or largest(config),
        codebook_sizes=tokenizer.codebook_sizes if tokenizer else (),
        code_width=tokenizer.width if tokenizer else 0,
        backend=backend(config),
    )
    return [
        _rank(config, world, number, chunks, kept)
        for number, chunks in enumerate(stages(config, world, tokenizer))
    ]


def backend(config: Config) -> Literal["te", "local"]:
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


def _rank(
    config: Config, world: int, stage: int, chunks: Sequence[Chunk], kept: Activations
) -> RankMemory:
    flights = passes(config, world, stage)
    # What a stage receives from the one before always gets a gradient.
    grows = stage > 0 or _gradient_reaches(config)
    messages = 2 * kept.hidden() if config.parallel.pp > 1 else 0
    layers = losses = waiting = 0
    once, later = [0], [0]  # what passes while losses are computed, and in the backward pass
    for number, chunk in enumerate(chunks):
        times = flights[number]
        if grows and chunk.layers:
            layers += times * (chunk.layers * kept.layer() + kept.shared())
            later.append(kept.backward() + _largest_gradient(chunk))
        if chunk.images:
            encoder, beside = kept.encoder()
            layers += times * (kept.projector() + encoder)
            once.append(beside)
        if chunk.text_loss:
            losses += times * kept.text_loss()
            waiting += (times - 1) * kept.text_loss()
            once.append(kept.text_logits() + kept.text_gradient())
        if chunk.visual_loss:
            losses += times * kept.visual_head()
            waiting += (times - 1) * kept.visual_head()
            once += [kept.visual_logits(), kept.head_gradients()]
            once += [kept.head_layer()] * config.train.recompute_visual_head
    return RankMemory(
        stage=stage,
        ranks=world // config.parallel.pp,
        layers=sum(chunk.layers for chunk in chunks),
        in_flight=sum(flights.values()),
        state=state(chunks, config, world),
        layer_activations=layers + messages,
        losses=losses + max(once),
        backward=waiting + max(later),
    )


def _largest_gradient(chunk: Chunk) -> int:
    """Of a weight of the layers: it exists for itself before it is added to the others."""
    inside = (s for s in chunk.shards if s.trained and ".layers." in s.name)
    return max((s.numbers * s.width for s in inside), default=0)


def _gradient_reaches(config: Config) -> bool:
    """Whether the layers of the language model need a backward pass."""
    return bool({"language_model", "projector", "vision_encoder"} & set(config.train.trainable))
