"""Reads distributed checkpoints (torch_dist) of GPTModel, as Megatron-LM saves them.

Their names are those of this project up to three things. Layers, and the experts of a layer, are
usually stacked into one tensor with an axis of its own. A norm in front of a linear is named as a
part of the linear, which is how Transformer Engine holds it. And vocabularies are padded. Settings
are in the arguments that Megatron-LM saves beside the tensors, as a pickle: it is opened with
``weights_only``, and what is not told then has to be given (``model.language.x=y``).
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_asvr.checkpoint.index import (
    COMMON,
    INDEX,
    Tiled,
    master_weights,
    open_index,
    read_common,
)
from megatron_asvr.config.load import override
from megatron_asvr.config.schema import Config, LanguageConfig, ModelConfig, RopeScalingConfig
from megatron_asvr.errors import CheckpointError, ConversionError
from megatron_asvr.hf import tables
from megatron_asvr.hf.source import Source, matched
from megatron_asvr.hf.tables import Rule
from megatron_asvr.parallel.stored import Stored, compose
from megatron_asvr.precision import FUSED_NAMES

KIND = "megatron-lm"
MASTERS = f"{KIND}, master weights"
_LATEST = "latest_checkpointed_iteration.txt"
_EMBEDDING = "embedding.word_embeddings.weight"
_PADDED = (_EMBEDDING, "output_layer.weight")  # rows for ids that no text has
_PREFIX = re.compile(rf"(.*?){re.escape(_EMBEDDING)}")
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
_STACKED = ("decoder.layers.", "mlp.experts.experts.")  # an axis of layers, one of experts
_OURS = ("decoder.layers.{}.", "mlp.experts.local_experts.{}.")
_HALVES = ("_w", "_v")  # gate and up projection, where they are saved apart

# The setting that each argument of Megatron-LM is.
_ARGUMENTS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_layers",
    "num_heads": "num_attention_heads",
    "head_dim": "kv_channels",
    "ffn_hidden_size": "ffn_hidden_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "rope_theta": "rotary_base",
    "norm_eps": "norm_epsilon",
    "num_experts": "num_experts",
    "experts_per_token": "moe_router_topk",
    "expert_ffn_hidden_size": "moe_ffn_hidden_size",
}
_OF_MIXTURES = ("num_experts", "experts_per_token", "expert_ffn_hidden_size")
# What the models of this project do, by the arguments that say so; absent ones say it too.
_WANTED = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "apply_layernorm_1p": False,
    "multi_latent_attention": False,
    "window_size": None,
    "mtp_num_layers": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_router_score_function": "softmax",
    "moe_layer_freq": 1,
}
# What no shape tells; without arguments these must be given.
_NEEDED = ("family", "num_heads", "vocab_size", "max_positions", "rope_theta", "norm_eps")


def read_megatron(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    masters: bool = False,
) -> Source:
    """The weights of a GPTModel by our names.

    Args:
        path: folder of one iteration, or the folder above with the name of the latest.
        overrides: ``model.language.x=y`` settings that win over the saved arguments.
        allow_missing: shell patterns of our names that need not be there.
        masters: take the optimizer's fp32 weights.

    Raises:
        ConversionError: it is no such checkpoint, a setting is unknown, the model is of another
            kind, or tensors do not fit.
        CheckpointError: its index is damaged.
    """
    folder = _iteration(Path(path))
    index = open_index(folder)
    found = [match for key in index if (match := _PREFIX.fullmatch(key))]
    found = [match for match in found if not _OPTIMIZER.match(match[1])]
    if len(found) != 1:
        raise ConversionError(f"{folder} holds {len(found)} {_EMBEDDING}; wanted one GPTModel")
    prefix = found[0][1]
    named = {key.removeprefix(prefix): x for key, x in index.items() if key.startswith(prefix)}
    model = {name: x for name, x in named.items() if not _OPTIMIZER.match(name)}
    ignored = [key for key in index if key.removeprefix(prefix) not in model]
    language = _language(folder, model, overrides)
    if masters:
        model = _exact(folder, model, prefix, index)
    tensors = _expanded(folder, model)
    ignored += _cut_padding(tensors, model, language.vocab_size)
    rules = [Rule(r.name, r.shape, ((r.name, r.shape),)) for r in tables.text_rules(language)]
    return matched(
        folder,
        MASTERS if masters else KIND,
        ModelConfig(language=language),
        rules,
        {tables.LM + name: x for name, x in tensors.items()},
        ignored=ignored,
        allow_missing=allow_missing,
    )


def _iteration(path: Path) -> Path:
    """The folder of tensors."""
    if (path / INDEX).is_file():
        return path
    if (path / _LATEST).is_file():
        name = (path / _LATEST).read_text(encoding="utf-8").strip()
        chosen = path / (f"iter_{int(name):07d}" if name.isdecimal() else "release")
        if (chosen / INDEX).is_file():
            return chosen
        path = chosen
    old = [x.name for x in path.glob("mp_rank_*")] if path.is_dir() else []
    raise ConversionError(
        f"{path} is no torch_dist checkpoint: it has no {INDEX}"
        + (f", but {old[0]}; Megatron-LM itself saves it anew with --ckpt-format" if old else "")
    )


def _language(folder: Path, model: dict[str, Tiled], overrides: Sequence[str]) -> LanguageConfig:
    """Settings: of the saved arguments, or from shapes; overrides win."""
    if odd := [text for text in overrides if not text.startswith("model.language.")]:
        raise ConversionError(f"{odd[0]!r}: a GPTModel has settings model.language.x=y only")
    given = {text.removeprefix("model.language.").partition("=")[0] for text in overrides}
    args, reason = _arguments(folder)
    if args is not None:
        _check_kind(folder, args)
    settings = _from_shapes(model) | ({} if args is None else _from_arguments(args))
    lacking = [k for k in _NEEDED if settings.get(k) is None and k not in given]
    if lacking:
        raise ConversionError(
            f"{folder} does not tell {', '.join(lacking)} ({reason}); give them: "
            + " ".join(f"model.language.{key}=..." for key in lacking)
        )
    known = {key: value for key, value in settings.items() if value is not None}
    config = Config(model=ModelConfig(language=LanguageConfig(**known)))
    language = override(config, overrides).model.language
    if language.is_mixture != (language.num_experts is not None):
        raise ConversionError(
            f"{folder}: {language.num_experts} experts in a model of family {language.family}"
        )
    return language


def _arguments(folder: Path) -> tuple[Any | None, str]:
    """The arguments that the checkpoint was made with; without them, why."""
    try:
        common = read_common(folder, allowed=[argparse.Namespace])
    except CheckpointError as err:
        return None, str(err)
    args = common.get("args")
    return args, f"{COMMON} has {'arguments without them' if args else 'no arguments'}"


def _check_kind(folder: Path, args: Any) -> None:
    """Refuse what would be another computation here."""
    odd = [
        f"{key}={getattr(args, key)!r} (wanted {wanted!r})"
        for key, wanted in _WANTED.items()
        if hasattr(args, key) and getattr(args, key) != wanted
    ]
    if odd:
        raise ConversionError(f"{folder} is of a model that no model here is: {', '.join(odd)}")


def _from_arguments(args: Any) -> dict[str, Any]:
    found = {ours: getattr(args, theirs, None) for ours, theirs in _ARGUMENTS.items()}
    if not found["num_experts"]:
        found |= dict.fromkeys(_OF_MIXTURES)
    grouped = getattr(args, "group_query_attention", False)
    if grouped or not hasattr(args, "group_query_attention"):
        found["num_kv_heads"] = getattr(args, "num_query_groups", None)
    qk_norm, mixture = getattr(args, "qk_layernorm", False), bool(found["num_experts"])
    families = {(False, False): "llama", (True, False): "qwen3", (False, True): "mixtral"}
    found["family"] = families.get((qk_norm, mixture), "qwen3_moe")
    if mixture and getattr(args, "moe_router_pre_softmax", False):
        found |= {"family": "qwen3_moe", "norm_topk_prob": False}
    if getattr(args, "add_qkv_bias", False):
        found["family"] = "qwen2"
    if getattr(args, "use_rope_scaling", False):  # megatron-core's constants of Llama 3
        found["rope_scaling"] = RopeScalingConfig(
            rope_type="llama3",
            factor=float(getattr(args, "rope_scaling_factor", 8.0)),
            original_max_position_embeddings=8192,
        )
    for key in ("rope_theta", "norm_eps"):
        found[key] = None if found[key] is None else float(found[key])
    return {key: value for key, value in found.items() if value is not None}


def _from_shapes(model: dict[str, Tiled]) -> dict[str, Any]:
    """What the tensors tell themselves."""
    found: dict[str, Any] = {"hidden_size": model[_EMBEDDING].shape[1]}
    found["tied_embeddings"] = "output_layer.weight" not in model
    proj = {k: x for k, x in model.items() if k.endswith("self_attention.linear_proj.weight")}
    stacked = next((x for k, x in proj.items() if not re.search(r"layers\.\d", k)), None)
    found["num_layers"] = len(proj) if stacked is None else stacked.shape[0]
    fc2 = [x for k, x in model.items() if k.endswith("mlp.linear_fc2.weight")]
    if fc2:
        found["ffn_hidden_size"] = fc2[0].shape[-1]
    return found


def _exact(
    folder: Path, model: dict[str, Tiled], prefix: str, index: dict[str, Tiled]
) -> dict[str, Tiled]:
    """The optimizer's fp32 weights in the place of the model's own, where these are rounded."""
    own = {prefix + name: x for name, x in model.items() if x.dtype == torch.float32}
    exact = own | master_weights(index)
    lost = [
        name
        for name, x in model.items()
        if prefix + name not in exact or exact[prefix + name].shape != x.shape
    ]
    if lost:
        raise ConversionError(
            f"{folder} has no fp32 master weight of {len(lost)} tensors, for example {lost[0]}, or "
            "only as part of a flat buffer; leave out --masters, or save the checkpoint with "
            "--dist-ckpt-optim-fully-reshardable"
        )
    return {name: exact[prefix + name] for name in model}


def _expanded(folder: Path, model: dict[str, Tiled]) -> dict[str, Stored]:
    """Every tensor of a layer, or of an expert, by our name without ``language_model.``."""
    found: dict[str, Stored] = {}
    for key, tiled in model.items():
        for name, weight in _parts(key, tiled):
            for fused, plain in FUSED_NAMES.items():
                name = name.replace(fused, plain)
            if name in found:
                raise ConversionError(f"{folder}: {name} comes twice, the second time as {key}")
            found[name] = weight
    for name in [name.removesuffix(_HALVES[0]) for name in found if name.endswith(_HALVES[0])]:
        halves = [found.pop(name + half) for half in _HALVES if name + half in found]
        rows = sum(x.shape[0] for x in halves)
        shape = (rows, *halves[0].shape[1:])
        fill = partial(_fill_halves, halves)
        found[name] = compose(shape, halves[0].dtype, fill, halves, tables.Halves().join)
    return found


def _parts(key: str, tiled: Tiled) -> Iterator[tuple[str, Stored]]:
    """What is stacked in a tensor, with numbers in the names."""
    pattern, axes = key, 0
    for theirs, ours in zip(_STACKED, _OURS, strict=True):
        before, found, rest = pattern.partition(theirs)
        if not found:
            continue
        number, _, below = rest.partition(".")
        if number.isdecimal():
            pattern = before + ours.format(number) + below
        else:
            pattern, axes = before + ours + rest, axes + 1
    shape = tiled.shape[axes:]
    for place in product(*map(range, tiled.shape[:axes])):
        start, size = place + (0,) * len(shape), (1,) * axes + shape
        yield pattern.format(*place), tiled.region(start, size, stacked=axes)


def _fill_halves(halves: Sequence[Stored], out: Tensor, start: int) -> None:
    """Fill ``out`` from element ``start`` on of tensors that follow one another."""
    begin = 0
    for half in halves:
        end = begin + half.num_bytes // half.dtype.itemsize
        low, high = max(begin, start), min(end, start + out.numel())
        if low < high:
            half.fill(out[low - start : high - start], low - begin)
        begin = end


def _cut_padding(tensors: dict[str, Stored], model: dict[str, Tiled], vocab_size: int) -> list[str]:
    """Leave out the rows of ids that no text has; what was left out, in words."""
    cut = []
    for name in _PADDED:
        rows, *width = model[name].shape if name in model else (0,)
        if rows > vocab_size:
            tensors[name] = model[name].region((0, 0), (vocab_size, *width))
            cut.append(f"{name}[{vocab_size}:{rows}]")
    return cut
