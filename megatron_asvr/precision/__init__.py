"""Which implementation the transformer layers use, chosen in one place and with a reason."""

import importlib
from typing import TYPE_CHECKING, Any, Literal

from megatron_asvr.platforms import Platform, apex

import torch

from megatron_asvr.batch import MicroBatch
from megatron_asvr.config.schema import Config, PrecisionConfig
from megatron_asvr.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

Backend = Literal["te", "local"]
Engine = Literal["none", "te", "emulated"]  # who multiplies in 8 bits
_DEFAULT = PrecisionConfig()
_MEGATRON_RECIPES = {
    "delayed": "delayed",
    "current": "tensorwise",
    "block": "blockwise",
    "mxfp8": "mxfp8",
}
# Smallest compute capability whose tensor cores know a recipe: Ada, Hopper, Blackwell.
_CAPABLE = {"delayed": (8, 9), "current": (8, 9), "block": (9, 0), "mxfp8": (10, 0)}
# From here on Transformer Engine 2.20.2 refuses a recipe again (pytorch/quantization.py:150).
_TOO_NEW = {"mxfp8": (12, 0)}
_LEAST_CUDA = {"block": (12, 9)}  # likewise, line 180 there

# Transformer Engine holds a norm inside the linear after it; checkpoints keep the unfused names.
FUSED_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def select_backend(
    platform: Platform, dtype: torch.dtype, settings: PrecisionConfig = _DEFAULT
) -> tuple[Backend, str]:
    """Name of the layer implementation, and why.

    Args:
        platform: what ``platforms.select()`` returned.
        dtype: of the computation.
        settings: of the run.

    Raises:
        ConfigError: Transformer Engine is asked for and cannot be had.
    """
    if settings.fp8.recipe != "none" and settings.fp8.emulate:
        return "local", "precision.fp8.emulate=true"
    if settings.backend == "local":
        return "local", "precision.backend=local"
    problem = _without_te(platform, dtype)
    if problem is None:
        return "te", "CUDA with Transformer Engine"
    if settings.backend == "te":
        raise ConfigError(f"precision.backend=te: {problem}; set precision.backend=auto")
    return "local", problem


def select_fp8(
    platform: Platform, dtype: torch.dtype, settings: PrecisionConfig
) -> tuple[Engine, str]:
    """Who multiplies in 8 bits, and why.

    Args:
        platform: what ``platforms.select()`` returned.
        dtype: of the computation.
        settings: of the run.

    Raises:
        ConfigError: 8 bits are asked for and nothing here can do them.
    """
    fp8 = settings.fp8
    if fp8.recipe == "none":
        return "none", "precision.fp8.recipe=none"
    if fp8.emulate:
        return "emulated", f"{fp8.recipe} scaling, precision.fp8.emulate=true"
    asked = f"precision.fp8.recipe={fp8.recipe} cannot run here"
    way_out = "set precision.fp8.emulate=true for the same numbers, slowly, or recipe=none"
    backend, reason = select_backend(platform, dtype, settings)
    if backend != "te":
        raise ConfigError(f"{asked}: {reason}; {way_out}")
    has, needs = platform.compute_capability, _CAPABLE[fp8.recipe]
    below = _TOO_NEW.get(fp8.recipe)
    if has is None or has < needs or (below is not None and has >= below):
        range_of = f"{needs}" if below is None else f"{needs} and below {below}"
        raise ConfigError(f"{asked}: it needs compute capability {range_of}, got {has}; {way_out}")
    cuda, least = platform.cuda_version, _LEAST_CUDA.get(fp8.recipe)
    if least is not None and (cuda is None or cuda < least):
        raise ConfigError(f"{asked}: it needs CUDA {least}, torch was built with {cuda}; {way_out}")
    return "te", f"{fp8.recipe} scaling in Transformer Engine"


def megatron_settings(
    platform: Platform, dtype: torch.dtype, settings: PrecisionConfig
) -> dict[str, Any]:
    """What megatron-core's configuration says about 8 bits; nothing where it has no part in them.

    Args:
        platform: what ``platforms.select()`` returned.
        dtype: of the computation.
        settings: of the run.

    Raises:
        ConfigError: 8 bits are asked for and nothing here can do them.
    """
    if select_fp8(platform, dtype, settings)[0] != "te":
        return {}
    fp8 = settings.fp8
    return {
        "fp8": fp8.format,
        "fp8_recipe": _MEGATRON_RECIPES[fp8.recipe],
        "fp8_param": fp8.weights,
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.history,
        "fp8_amax_compute_algo": fp8.amax,
    }


def fuse_gradients(platform: Platform) -> tuple[bool, str]:
    """Whether megatron-core's linears add up gradients of weights in their product, and why.

    megatron-core and Transformer Engine have one switch for it; on a CPU the products are ours.
    Transformer Engine needs nothing more, but megatron-core's own output layer wants an extension
    of apex, and refuses to be built without it.

    Args:
        platform: what ``platforms.select()`` returned.
    """
    if platform.name != "cuda":
        return False, "on a CPU our own products do so, where no tensor parallelism splits them"
    usable, found = apex.detect()
    if not usable or not apex.compiled_parts()[apex.FUSED]:
        return False, f"megatron-core needs apex's {apex.FUSED} for it; apex: {found}"
    return True, f"apex's {apex.FUSED} is there"


def _without_te(platform: Platform, dtype: torch.dtype) -> str | None:
    """Why Transformer Engine cannot be used; None when it can."""
    if platform.name != "cuda":
        return f"Transformer Engine needs CUDA; the platform is {platform.name}"
    if dtype == torch.float32:
        return "Transformer Engine's attention over documents has no fp32 kernel"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:
        return f"Transformer Engine cannot be imported ({error}); the extra 'gpu' installs it"
    return None


def check_attention(config: Config, backend: Backend) -> None:
    """Return when the attention of ``backend`` can do what the layout asks of it.

    Args:
        config: the run.
        backend: from ``select_backend``.

    Raises:
        ConfigError: context parallelism with a sliding window in Transformer Engine, whose ring of
            keys and values knows no window and whose other ways take no packed documents.
    """
    cp, window = config.parallel.cp, config.model.language.sliding_window
    if backend == "te" and cp > 1 and window is not None:
        raise ConfigError(
            f"parallel.cp={cp} with model.language.sliding_window={window}: Transformer Engine's "
            "attention cannot do both; use cp=1 and other degrees, or sliding_window=null where no "
            f"document is longer than {window}"
        )


def block_spec(
    config: "TransformerConfig", backend: Backend, *, vp_stage: int | None = None
) -> "TransformerBlockSubmodules":
    """The layers of this pipeline stage (and model chunk) and the norm after the last one.

    Args:
        config: megatron-core's configuration of the model.
        backend: from ``select_backend``.
        vp_stage: model chunk under virtual pipeline stages.
    """
    layers = importlib.import_module(f"megatron_asvr.precision.{backend}")
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    from megatron_asvr.precision.local import RMSNorm

    spec = layers.layer_spec(qk_norm=config.qk_layernorm, num_experts=config.num_moe_experts)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=RMSNorm)


def attention_rule(
    batch: MicroBatch, backend: Backend, *, sliding_window: int | None
) -> torch.Tensor:
    """Who attends to whom, as the attention of ``backend`` takes it through the layers.

    ``local``: lengths of documents, int64 [B, n], where they say it all, else a dense mask, bool
    [B, 1, S / context-parallel degree, S], True = hidden. ``te``: int32 [documents + 1], where
    documents end, with their padding.

    Args:
        batch: the micro-batch.
        backend: from ``select_backend``.
        sliding_window: positions that a token sees, itself included; None is all.
    """
    layers = importlib.import_module(f"megatron_asvr.precision.{backend}")
    return layers.attention_rule(batch, sliding_window=sliding_window)
