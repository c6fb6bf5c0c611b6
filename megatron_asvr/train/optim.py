"""Gradient buffers, AdamW and its schedule, all of megatron-core, from our settings."""

import math
from collections.abc import Sequence

from megatron_asvr.platforms import mcore, select  # noqa: F401  (mcore prepares the process)

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
)
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from torch import nn

from megatron_asvr.config.schema import OptimConfig, TrainConfig
from megatron_asvr.model.asvr import DTYPES

# As in the official recipe (its trainer's default): matrices decay; biases and norms do not. A
# bias is known by its name, because the biases of a packed projection have two dimensions.
_NO_DECAY = ParamKey(
    with_name_predicate=ParamWithNamePredicate(
        name="bias_or_norm", fn=lambda param, name: name.endswith("bias") or param.dim() == 1
    )
)


def wrap(chunks: Sequence[nn.Module], config: OptimConfig) -> list[DistributedDataParallel]:
    """The model with fp32 gradient buffers, summed over data- and context-parallel ranks.

    The sum is not divided by anything: every loss is already divided by its global count, which
    ``calculate_per_token_loss`` makes megatron-core respect (its gradient_scaling_factor is 1).
    With ``overlap_grad_reduce`` a part of the buffers is summed as soon as all its gradients are
    there, in an order that does not depend on what a batch holds: every trained parameter gets a
    gradient from every micro-batch.

    Args:
        chunks: the bare model of this rank; each has megatron-core's configuration.
        config: whether optimizer state is sharded, and when gradients are summed.
    """
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.distributed,
        overlap_grad_reduce=config.overlap_grad_reduce,
        fp8_param_gather=any(chunk.config.fp8_param for chunk in chunks),
        # Non-finite numbers are found by train/step.py, which can name the samples.
        check_for_nan_in_grad=False,
    )
    assert all(chunk.config.calculate_per_token_loss for chunk in chunks)
    wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]
    select()[0].release_memory()  # the weights were elsewhere before they came into the buffers
    if config.overlap_grad_reduce:  # after the last micro-batch only
        no_sync = [chunk.no_sync for chunk in wrapped]
        wrapped[0].config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def make_optimizer(
    chunks: Sequence[DistributedDataParallel], train: TrainConfig
) -> MegatronOptimizer:
    """AdamW over the trained parameters; a rank without any takes part in the gradient norm.

    Args:
        chunks: from ``wrap``.
        train: the stage's settings.
    """
    o = train.optim
    settings = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip_grad,
        params_dtype=DTYPES[train.precision],
        bf16=train.precision == "bf16",
        use_distributed_optimizer=o.distributed,
        fp8_recipe=next((c.config.fp8_recipe for c in chunks if c.config.fp8_param), None),
    )
    return get_megatron_optimizer(
        settings, list(chunks), config_overrides={_NO_DECAY: ParamGroupOverride(wd_mult=0.0)}
    )


def make_schedule(
    optimizer: MegatronOptimizer, config: OptimConfig, *, total_steps: int, done_steps: int
) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then a cosine to ``min_lr``; a pure function of the step.

    Args:
        optimizer: whose parameter groups it sets.
        config: learning rates and warm-up.
        total_steps: steps of the whole run.
        done_steps: steps already done by the run.
    """
    warmup = min(math.ceil(config.warmup_fraction * total_steps), total_steps - 1)
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=total_steps,
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
    )
    schedule.step(done_steps)
    return schedule


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """Rate of the next step; 0 on a rank that trains nothing."""
    groups = optimizer.param_groups
    return float(groups[0]["lr"]) if groups else 0.0
