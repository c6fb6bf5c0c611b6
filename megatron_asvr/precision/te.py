"""Transformer layers on Transformer Engine's linears and norms, for CUDA.

The attention core stays the dense one of ``precision/local.py``: the attention rule of a sample
with independent questions is no mask type that Transformer Engine has a fused kernel for.
"""

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron-core)

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_asvr.precision import FUSED_NAMES
from megatron_asvr.precision.local import DenseAttention


def layer_spec(*, qk_norm: bool) -> ModuleSpec:
    """One transformer layer of megatron-core with Transformer Engine's linears and norms.

    Args:
        qk_norm: normalise queries and keys per head.
    """
    spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    spec.submodules.self_attention.submodules.core_attention = DenseAttention
    spec.submodules.sharded_state_dict_keys_map = dict(FUSED_NAMES)
    return spec
