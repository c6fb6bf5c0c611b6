"""The sharded form of what a checkpoint holds: trained weights and optimizer state.

megatron-core describes every rank's share of a tensor by its place in the full tensor, so a
checkpoint written with one layout can be read with another. Layers are stored under their own
names (``non_homogeneous_layers``), not stacked into one tensor, so the keys of a checkpoint are
the canonical parameter names.
"""

from collections.abc import Sequence
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process)

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

METADATA = {
    # megatron-core's default type cannot be saved by the distributed optimizer (0.16.1, 0.19.2).
    "distrib_optim_sharding_type": "fully_reshardable",
    "non_homogeneous_layers": True,
}


def trained_weights(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """Sharded tensors of all trained parameters, by the number of their chunk and local name.

    Args:
        chunks: the bare model of this rank; each has megatron-core's ``sharded_state_dict``.
    """
    weights = {}
    for number, chunk in enumerate(chunks):
        trained = {name for name, param in chunk.named_parameters() if param.requires_grad}
        for name, value in chunk.sharded_state_dict(metadata=METADATA).items():
            if name in trained and isinstance(value, (ShardedTensor, ShardedTensorFactory)):
                weights[f"{number}.{name}"] = value
    return weights


def sharded_state(
    chunks: Sequence[nn.Module], optimizer: MegatronOptimizer, *, is_loading: bool
) -> dict[str, Any]:
    """What megatron-core's ``dist_checkpointing`` saves, or fills when ``is_loading``."""
    _count_padding(optimizer)
    weights = trained_weights(chunks)
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=METADATA
        ),
    }


def _count_padding(optimizer: MegatronOptimizer) -> None:
    """Let the distributed optimizer's gathered buffers keep the padding between buckets.

    Left out, it shifts all that follows: the places of the parameters count it
    (distrib_optimizer.py, get_parameter_state_dp_zero and sharded_param_state_fully_reshardable,
    in 0.16.1 and 0.19.2). A buffer has several buckets when stages share a tied embedding.
    """
    for part in optimizer.chained_optimizers:
        for buffer in getattr(part, "buffers", ()):
            buffer.numel_unpadded = buffer.numel
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()


def load_state(
    state: dict[str, Any], chunks: Sequence[nn.Module], optimizer: MegatronOptimizer, *, step: int
) -> None:
    """Take over a filled ``sharded_state``.

    Args:
        state: filled by ``dist_checkpointing``.
        chunks: the bare model of this rank.
        optimizer: of it.
        step: optimizer steps done.
    """
    nn.ModuleList(chunks).load_state_dict(state["model"], strict=False)
    with torch.no_grad():  # fp32 main weights are views of the parameters themselves
        optimizer.load_state_dict(state["optimizer"])
    for group in optimizer.param_groups:
        group["step"] = step  # rank 0 wrote it for all, and does not know it if it trains nothing
