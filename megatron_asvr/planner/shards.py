"""What every rank of a run holds, from modules built at their real sizes without memory.

A model of any size is built on torch's meta device, by the same constructors as in training, once
for every pipeline stage: the ranks of a tensor-parallel group hold shards of the same shapes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_asvr.platforms import mcore, without_memory  # noqa: F401  (mcore prepares)

from torch import nn

from megatron_asvr.config.schema import Config
from megatron_asvr.model.asvr import AsvrModel
from megatron_asvr.model.sharding import full_shape, is_expert, named
from megatron_asvr.model.tokenizer import TokenizerConfig, VisualTokenizer
from megatron_asvr.parallel.groups import Groups, imagined
from megatron_asvr.parallel.plan import make_plan
from megatron_asvr.planner.rehearsal import Layers, Passes, Shape, rehearse


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A parameter of one rank.

    Attributes:
        name: canonical.
        numbers: elements of this rank's shard, padding included.
        full: elements of the whole parameter, without padding.
        width: bytes of an element.
        trained: it has a gradient and state of the optimizer.
        is_expert: of a mixture; its gradients are summed over other ranks.
        is_shared: the first and the last stage hold it, tied.
    """

    name: str
    numbers: int
    full: int
    width: int
    trained: bool
    is_expert: bool
    is_shared: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A model chunk of one rank.

    Attributes:
        shards: its parameters, in the module's order.
        layers: of the language model.
        images: it encodes images.
        text_loss: it ends in the LM head.
        visual_loss: it ends in the visual head.
        constants: bytes of what is no parameter: codebooks, and what an online tokenizer has alone.
        passes: what a micro-batch needs; None where that was not asked for.
    """

    shards: tuple[Shard, ...]
    layers: int
    images: bool
    text_loss: bool
    visual_loss: bool
    constants: int
    passes: Passes | None


def stages(
    config: Config,
    world: int,
    tokenizer: TokenizerConfig | None,
    *,
    tp_rank: int = 0,
    micro_batch: tuple[Shape, Layers] | None = None,
    joined: bool = False,
) -> list[list[Chunk]]:
    """The chunks of every pipeline stage, of one tensor-parallel rank.

    Args:
        config: the run, checked.
        world: number of ranks.
        tokenizer: what the visual tokenizer quantises; None without a visual loss.
        tp_rank: which rank of the tensor-parallel group.
        micro_batch: what is to go forward and back through every chunk (see ``rehearse``).
        joined: the tokenizer's encoder is the model's (``model.images.one_pass``).

    Raises:
        LaunchError: this process is a rank of a job.
    """
    plan = make_plan(config, world, tokenizer.codebook_sizes if tokenizer else ())
    found = []
    for stage in range(plan.pp):
        with imagined(plan, tp_rank + stage * (world // plan.pp)) as groups:
            assert (groups.pp_rank, groups.tp_rank) == (stage, tp_rank)
            chunks = range(plan.vpp or 1)
            parts = (config, groups, tokenizer, micro_batch, joined)
            found.append([_chunk(*parts, number if plan.vpp else None) for number in chunks])
    return found


def _chunk(
    config: Config,
    groups: Groups,
    tokenizer: TokenizerConfig | None,
    micro_batch: tuple[Shape, Layers] | None,
    joined: bool,
    vp_stage: int | None,
) -> Chunk:
    with without_memory():
        visual = VisualTokenizer(tokenizer) if tokenizer else None
        model = AsvrModel(config, groups=groups, tokenizer=visual, vp_stage=vp_stage)
    # As train/start.py does before the first step.
    model.leave_out_unused()
    if visual is not None and visual.encoder is not None:
        visual.encoder.leave_out_unused()
    if joined:
        model.images.share()
    lm, constants = model.language_model, [*model.buffers()]
    if (online := model.images.tokenizer) is not None:
        held = {x.untyped_storage()._cdata for x in model.parameters()}
        constants += [x for x in online.parameters() if x.untyped_storage()._cdata not in held]
        constants += online.buffers()
    return Chunk(
        shards=tuple(_shards(model, groups)),
        layers=0 if lm is None else len(lm.decoder.layers),
        images=model.pre_process,
        text_loss=model.post_process,
        visual_loss=model.visual_head is not None,
        constants=sum(x.numel() * x.element_size() for x in constants),
        passes=rehearse(model, *micro_batch) if micro_batch else None,
    )


def _shards(model: nn.Module, groups: Groups) -> Iterable[Shard]:
    for name, parameter in named(model):
        yield Shard(
            name=name,
            numbers=parameter.numel(),
            full=math.prod(full_shape(parameter, groups=groups)),
            width=parameter.element_size(),
            trained=parameter.requires_grad,
            is_expert=is_expert(parameter),
            is_shared=getattr(parameter, "shared_embedding", False),
        )


def whole(found: Sequence[Sequence[Chunk]], config: Config) -> dict[str, int]:
    """Numbers of every parameter of the whole model without padding; a tied weight comes once.

    Args:
        found: of ``stages``, without expert parallelism.
        config: the run.
    """
    assert config.parallel.ep == 1, "the experts of other ranks are not in sight"
    return {shard.name: shard.full for stage in found for chunk in stage for shard in chunk.shards}
