"""The sharded form of what a checkpoint holds: trained weights and optimizer state.

megatron-core describes every rank's share of a tensor by its place in the full tensor, so a
checkpoint written with one layout can be read with another. Layers are stored under their own
names (``non_homogeneous_layers``), not stacked into one tensor, so the keys of a checkpoint are
the canonical parameter names.
"""

from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process)

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

METADATA = {
    # megatron-core's default type cannot be saved by the distributed optimizer (0.16.1, 0.19.2).
    "distrib_optim_sharding_type": "fully_reshardable",
    "non_homogeneous_layers": True,
}


def trained_weights(model: nn.Module) -> dict[str, Any]:
    """Sharded tensors of all trained parameters, by their local names.

    Args:
        model: the bare model (no wrappers); has megatron-core's ``sharded_state_dict``.
    """
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    sharded = model.sharded_state_dict(metadata=METADATA)
    return {
        name: value
        for name, value in sharded.items()
        if name in trained and isinstance(value, (ShardedTensor, ShardedTensorFactory))
    }


def sharded_state(
    model: nn.Module, optimizer: MegatronOptimizer, *, is_loading: bool
) -> dict[str, Any]:
    """What megatron-core's ``dist_checkpointing`` saves, or fills when ``is_loading``."""
    weights = trained_weights(model)
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=METADATA
        ),
    }
