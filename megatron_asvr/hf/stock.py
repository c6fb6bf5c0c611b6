"""The one door to transformers, and the translation of configurations through it.

transformers is imported on first use: it takes seconds and most commands never need it.
"""

import importlib
import math
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from megatron_asvr.config.schema import (
    LanguageConfig,
    ModelConfig,
    RopeScalingConfig,
    VisionConfig,
)
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf.resolution import NEXT_ARCHITECTURE, NEXT_TYPE, stock_pinpoints

TEXT_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
TEXT_CONFIGS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "mixtral": "MixtralConfig",
    "qwen3_moe": "Qwen3MoeConfig",
}
LLAVA_ARCHITECTURE = "LlavaForConditionalGeneration"
WHOLE = (LLAVA_ARCHITECTURE, NEXT_ARCHITECTURE)  # with images
VISION_MODEL_TYPE = "siglip_vision_model"
VARIABLE_RESOLUTION = (
    "a SigLIP2 encoder of variable resolution (naflex) has other patch embeddings and positions; "
    "take a SigLIP2 of fixed resolution (its config.json says SiglipModel)"
)
_ORIGINAL = "original_max_position_embeddings"


def transformers() -> ModuleType:
    """The transformers package, quiet: our callers report what matters themselves.

    Raises:
        ConversionError: it cannot be imported.
    """
    try:
        module = importlib.import_module("transformers")
    except ImportError as e:
        raise ConversionError(
            f"transformers cannot be imported ({e}); install: pip install 'transformers>=5.23'"
        ) from e
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


def read_hf_config(folder: str | Path) -> Any:
    """The configuration object of a Hugging Face folder; code in the folder is never run.

    Raises:
        ConversionError: there is no valid ``config.json`` of a model that transformers knows.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConversionError(f"{path} does not exist; give a folder in Hugging Face format")
    auto = transformers().AutoConfig
    try:
        return auto.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers raises many types here, all of them about this file
        raise ConversionError(f"{path} cannot be read as a model configuration: {e}") from e


def language_config_from_hf(folder: str | Path) -> LanguageConfig:
    """Settings of the language model in a text-only or LLaVA folder.

    Raises:
        ConversionError: no such model, or one with a property this project does not build.
    """
    return language_from(read_hf_config(folder), str(folder))


def vision_config_from_hf(folder: str | Path, *, feature_layer: int = -2) -> VisionConfig:
    """Settings of the vision encoder in a SigLIP or LLaVA folder.

    Args:
        folder: a folder in Hugging Face format.
        feature_layer: selected layer of a vision-only folder; a LLaVA folder brings its own.

    Raises:
        ConversionError: no such encoder, or one with a property this project does not build.
    """
    return vision_from(read_hf_config(folder), str(folder), feature_layer=feature_layer)


def language_from_raw(raw: dict[str, Any], where: str) -> LanguageConfig:
    """Settings of a language model whose ``config.json`` has a model_type of somebody's own.

    Args:
        raw: the file; its model_type must contain the name of the family it is derived from.
        where: for messages.

    Raises:
        ConversionError: no family fits, or a property is not one that this project builds.
    """
    kind = str(raw.get("model_type"))
    known = {"qwen2": "qwen2", "qwen": "qwen2", "mistral": "mistral", "llama": "llama"}
    family = next((family for word, family in known.items() if word in kind), None)
    if family is None:
        raise ConversionError(
            f"{where}: model_type {kind!r} is derived from none of llama, mistral and qwen2"
        )
    given = {k: v for k, v in raw.items() if k not in ("model_type", "architectures")}
    return language_from(_build(TEXT_CONFIGS[family], given), where)


def _require(where: str, config: Any, **allowed: tuple) -> None:
    """Refuse a property (absent counts as its usual value, the first) that we would get wrong."""
    for key, values in allowed.items():
        got = getattr(config, key, values[0])
        if got not in values:
            wanted = " or ".join(repr(v) for v in values)
            raise ConversionError(f"{where}: {key} is {got!r}; only {wanted} can be converted")


def language_from(config: Any, where: str) -> LanguageConfig:
    """Settings of the language model that a transformers configuration describes."""
    text = getattr(config, "text_config", config)
    if text.model_type not in TEXT_ARCHITECTURES:
        known = ", ".join(TEXT_ARCHITECTURES)
        raise ConversionError(
            f"{where}: no language model of a known family (model_type {text.model_type!r}); "
            f"known are {known}"
        )
    _require(where, text, hidden_act=("silu",), attention_bias=(False,), mlp_bias=(False,))
    rope_theta, rope_scaling = _rope_from(text.rope_parameters or {}, where)
    width = getattr(text, "head_dim", None)
    plain_width = text.hidden_size // text.num_attention_heads
    return LanguageConfig(
        family=text.model_type,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=None if width in (None, plain_width) else width,
        ffn_hidden_size=text.intermediate_size,
        **_mixture_from(text, where),
        vocab_size=text.vocab_size,
        max_positions=text.max_position_embeddings,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=text.rms_norm_eps,
        tied_embeddings=bool(config.tie_word_embeddings),
        sliding_window=_sliding_window(text, where),
        init_std=text.initializer_range,
    )


_ROPE_TYPES = get_args(RopeScalingConfig.__annotations__["rope_type"])
_ROPE_KEYS = tuple(f.name for f in fields(RopeScalingConfig))


def _rope_from(rope: dict[str, Any], where: str) -> tuple[float, RopeScalingConfig]:
    """Base and scaling of the rotary positions from ``rope_parameters``."""
    given = {k: v for k, v in rope.items() if v is not None}
    theta, kind = given.pop("rope_theta", None), given.get("rope_type", "default")
    if kind not in _ROPE_TYPES or theta is None:
        known = ", ".join(_ROPE_TYPES)
        raise ConversionError(
            f"{where}: rope_parameters {rope} have no rope_theta or a rope_type other than {known}"
        )
    given.pop("type", None)  # the old name of rope_type
    scale, scale_all = given.pop("mscale", 0.0), given.pop("mscale_all_dim", 0.0)
    if scale and scale_all:
        log = math.log(max(given["factor"], 1.0)) / 10
        given.setdefault("attention_factor", (scale * log + 1) / (scale_all * log + 1))
    for key, usual in (("partial_rotary_factor", 1.0), ("truncate", True)):
        if given.pop(key, usual) != usual:
            raise ConversionError(f"{where}: rope_parameters {rope}: only {key}={usual} is built")
    unknown = [key for key in given if key not in _ROPE_KEYS]
    if unknown:
        raise ConversionError(f"{where}: rope_parameters {rope}: unknown keys {unknown}")
    return float(theta), RopeScalingConfig(**given)


def _rope_parameters(language: LanguageConfig) -> dict[str, Any]:
    """Base and scaling of the rotary positions as ``rope_parameters``."""
    scaling = language.rope_scaling
    given: dict[str, Any] = {"rope_theta": language.rope_theta, "rope_type": scaling.rope_type}
    keys = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", _ORIGINAL, "beta_fast", "beta_slow", "attention_factor"),
    }
    values = {key: getattr(scaling, key) for key in keys[scaling.rope_type]}
    return given | {key: value for key, value in values.items() if value is not None}


def _mixture_from(text: Any, where: str) -> dict[str, Any]:
    """Our settings of a mixture of experts; none for another family.

    The coefficient of the load-balancing loss stays ours: Hugging Face's loss is another formula.
    """
    if text.model_type == "mixtral":
        return {
            "num_experts": text.num_local_experts,
            "experts_per_token": text.num_experts_per_tok,
        }
    if text.model_type != "qwen3_moe":
        return {}
    _require(where, text, decoder_sparse_step=(1,), mlp_only_layers=([], None))
    return {
        "num_experts": text.num_experts,
        "experts_per_token": text.num_experts_per_tok,
        "expert_ffn_hidden_size": text.moe_intermediate_size,
        "norm_topk_prob": text.norm_topk_prob,
    }


def _mixture_fields(language: LanguageConfig) -> dict[str, Any]:
    """The settings of a mixture of experts as its transformers configuration calls them."""
    if not language.is_mixture:
        return {}
    shared = {"num_experts_per_tok": language.experts_per_token}
    if language.family == "mixtral":
        return shared | {
            "num_local_experts": language.num_experts,
            "intermediate_size": language.expert_ffn,
        }
    return shared | {
        "num_experts": language.num_experts,
        "moe_intermediate_size": language.expert_ffn,
        "norm_topk_prob": language.norm_topk_prob,
    }


def _sliding_window(text: Any, where: str) -> int | None:
    if text.model_type == "llama":
        return None
    kinds = set(getattr(text, "layer_types", None) or [])
    if len(kinds) > 1:
        raise ConversionError(
            f"{where}: layers differ in attention ({sorted(kinds)}); not supported"
        )
    return None if kinds == {"full_attention"} else text.sliding_window


def vision_from(config: Any, where: str, *, feature_layer: int = -2) -> VisionConfig:
    """Settings of the vision encoder that a transformers configuration describes."""
    vision = getattr(config, "vision_config", config)
    if vision.model_type.startswith("siglip2"):
        raise ConversionError(f"{where}: {VARIABLE_RESOLUTION}")
    if vision.model_type != VISION_MODEL_TYPE:
        raise ConversionError(
            f"{where}: vision model_type is {vision.model_type!r}; only {VISION_MODEL_TYPE!r} "
            "(SigLIP, and SigLIP2 with a fixed resolution) can be converted"
        )
    _require(where, vision, hidden_act=("gelu_pytorch_tanh",), num_channels=(3,))
    if config.model_type in ("llava", NEXT_TYPE):
        _require(where, config, vision_feature_select_strategy=("full",))
        _require(where, config, projector_hidden_act=("gelu",), multimodal_projector_bias=(True,))
        feature_layer = config.vision_feature_layer
        if not isinstance(feature_layer, int):
            raise ConversionError(
                f"{where}: vision_feature_layer is {feature_layer}; one layer is supported"
            )
    return VisionConfig(
        hidden_size=vision.hidden_size,
        num_layers=vision.num_hidden_layers,
        num_heads=vision.num_attention_heads,
        ffn_hidden_size=vision.intermediate_size,
        image_size=_side(vision.image_size, "image_size", where),
        patch_size=_side(vision.patch_size, "patch_size", where),
        norm_eps=vision.layer_norm_eps,
        feature_layer=feature_layer,
    )


def _side(size: Any, key: str, where: str) -> int:
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1:
        raise ConversionError(f"{where}: {key} {size} is not square")
    return int(sides.pop())


def text_config(language: LanguageConfig, ids: dict[str, int | None]) -> Any:
    """The transformers configuration of a language model.

    Args:
        language: our settings.
        ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.

    Raises:
        ConversionError: the family cannot express one of the settings.
    """
    family = language.family
    given: dict[str, Any] = dict(
        hidden_size=language.hidden_size,
        num_hidden_layers=language.num_layers,
        num_attention_heads=language.num_heads,
        num_key_value_heads=language.kv_heads,
        intermediate_size=language.ffn_hidden_size,
        vocab_size=language.vocab_size,
        max_position_embeddings=language.max_positions,
        rope_parameters=_rope_parameters(language),
        rms_norm_eps=language.norm_eps,
        tie_word_embeddings=language.tied_embeddings,
        initializer_range=language.init_std,
        **ids,
    )
    if family != "qwen2" or language.head_dim is not None:
        given["head_dim"] = language.width_per_head
    given |= _mixture_fields(language)
    if family in ("mistral", "mixtral"):
        given["sliding_window"] = language.sliding_window
    elif language.sliding_window is not None:
        if family == "llama":
            raise ConversionError(
                "language.sliding_window is set, but the llama family has none in transformers; "
                "use family mistral"
            )
        given |= {"use_sliding_window": True}
        if family != "qwen3_moe":
            given["max_window_layers"] = 0
        given["sliding_window"] = language.sliding_window
    return _build(TEXT_CONFIGS[family], given)


def llava_config(model: ModelConfig, ids: dict[str, int | None], image_token_id: int) -> Any:
    """The transformers configuration of the whole model: LLaVA, or any-resolution LLaVA-NeXT.

    Raises:
        ConversionError: the model has no stock form.
    """
    vision, pinpoints = model.vision, stock_pinpoints(model)
    tower = {
        "hidden_size": vision.hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "intermediate_size": vision.ffn_hidden_size,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.norm_eps,
        "vision_use_head": False,
    }
    given = dict(
        vision_config=_build("SiglipVisionConfig", tower),
        text_config=text_config(model.language, ids),
        image_token_index=image_token_id,
        image_seq_length=vision.num_patches,
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_feature_layer=vision.feature_layer,
        vision_feature_select_strategy="full",
        tie_word_embeddings=model.language.tied_embeddings,
        **ids,
    )
    if pinpoints is None:
        return _build("LlavaConfig", given)
    return _build("LlavaNextConfig", given | {"image_grid_pinpoints": pinpoints})


def _build(kind: str, given: dict[str, Any]) -> Any:
    try:
        return getattr(transformers(), kind)(**given)
    except Exception as e:  # its validators raise their own types
        raise ConversionError(f"transformers refuses these settings as {kind}: {e}") from e


def stock_shapes(architecture: str, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the stock model's weights in memory (tied weights once).

    Args:
        architecture: name of a transformers model class.
        config: its configuration.
    """
    torch = importlib.import_module("torch")
    with torch.device("meta"):
        model = getattr(transformers(), architecture)(config)
    skip = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {k: tuple(v.shape) for k, v in model.state_dict().items() if k not in skip}
