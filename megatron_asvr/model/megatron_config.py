"""The language model's settings in megatron-core's words."""

from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron-core)

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_asvr import platforms, precision
from megatron_asvr.config.schema import LanguageConfig, PrecisionConfig
from megatron_asvr.model import rope
from megatron_asvr.parallel.plan import ParallelPlan


def transformer_config(
    config: LanguageConfig,
    plan: ParallelPlan,
    dtype: torch.dtype,
    *,
    recompute: str = "none",
    settings: PrecisionConfig | None = None,
) -> TransformerConfig:
    """megatron-core's configuration of the language model.

    Args:
        config: the language model.
        plan: parallel degrees.
        dtype: of the parameters and the computation, float32 or bfloat16.
        recompute: ``full`` keeps each layer's input for the backward pass and computes the layer
            again; ``selective`` does so with attention only; ``none`` keeps everything.
        settings: of 8 bits.
    """
    platform = platforms.select()[0]
    virtual = plan.vpp is not None
    full = recompute == "full"
    window = config.sliding_window
    mixture = _mixture_settings(config, plan) if config.is_mixture else {}
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_query_groups=config.kv_heads,
        kv_channels=config.width_per_head,
        softmax_scale=rope.softmax_scale(config),
        ffn_hidden_size=config.expert_ffn if mixture else config.ffn_hidden_size,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=config.qkv_bias,
        window_size=None if window is None else (window - 1, 0),  # Transformer Engine's attention
        qk_layernorm=config.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=config.init_std,
        perform_initialization=False,  # sharding.seeded_init or load_weights follows
        use_cpu_initialization=platform.name == "cpu",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=plan.tp,
        pipeline_model_parallel_size=plan.pp,
        virtual_pipeline_model_parallel_size=plan.vpp,
        pipeline_model_parallel_layout=_chunks(plan),
        context_parallel_size=plan.cp,
        sequence_parallel=plan.sp,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        # megatron-core's batched point-to-point calls give wrong numbers under gloo with
        # virtual stages, so those use the overlapped ones.
        overlap_p2p_comm=virtual,
        batch_p2p_comm=not virtual,
        # train.deterministic has told torch so in this rank.
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),
        calculate_per_token_loss=True,  # the losses are divided by exact global counts
        # Checkpoint keys carry global layer numbers: the canonical names.
        hetereogenous_dist_checkpoint=True,
        gradient_accumulation_fusion=precision.fuse_gradients(platform)[0],
        # Fusions that need CUDA extensions or a compiler.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **mixture,
        **precision.megatron_settings(platform, dtype, settings or PrecisionConfig()),
    )


def _mixture_settings(config: LanguageConfig, plan: ParallelPlan) -> dict[str, Any]:
    """The part of ``transformer_config`` that a mixture of experts in every layer needs.

    Every token reaches all its experts: capacities, which would drop tokens, stay off.
    """
    return {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.expert_ffn,
        "moe_router_topk": config.experts_per_token,
        # Softmax over the chosen experts alone is softmax over all, divided by the chosen sum.
        "moe_router_pre_softmax": config.family == "qwen3_moe" and not config.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # instead: precision/routing.py
        "moe_aux_loss_coeff": config.router_aux_loss_coef,
        "moe_token_dispatcher_type": "alltoall",
        "moe_expert_capacity_factor": None,
        "expert_model_parallel_size": plan.ep,
        "expert_tensor_parallel_size": 1,
    }


def _chunks(plan: ParallelPlan) -> list[list[str]] | None:
    """What each model chunk holds, in megatron-core's words; None: the same number of layers."""
    if plan.pp == 1 or not plan.stages:
        return None
    chunks = [["decoder"] * number for number in plan.stages]
    return [["embedding", *chunks[0]], *chunks[1:-1], [*chunks[-1], "loss"]]
