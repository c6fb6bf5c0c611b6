"""Checks across settings: everything that can be known to fail before any work is done."""

import difflib
from collections.abc import Iterable

from megatron_asvr.config.layout import check_layout, divisors
from megatron_asvr.config.precision import check_precision
from megatron_asvr.config.resolution import check_resolution
from megatron_asvr.config.schema import PARTS, TEMPLATES, Config, LanguageConfig, OptimConfig
from megatron_asvr.errors import ConfigError


def check(config: Config, world: int | None = None) -> Config:
    """The same configuration, after every check across its settings.

    Args:
        config: the run.
        world: number of ranks; None leaves out what depends on it.

    Raises:
        ConfigError: the first setting that cannot work, with the values that would; of the layout,
            every one at once.
    """
    _check_widths(config)
    _check_rope(config.model.language)
    _check_experts(config.model.language)
    _check_train(config)
    _check_optim(config.train.optim)
    _check_data(config)
    _check_sources(config)
    _check_augment(config)
    _check_loss(config)
    check_resolution(config)
    check_precision(config)
    check_layout(config, world)
    _check_files(config)
    return config


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _positive(config: object, prefix: str, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None:
            _require(value > 0, f"{prefix}.{name}={value} must be positive")


def _not_negative(config: object, prefix: str, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= 0, f"{prefix}.{name}={value} must not be negative")


def _check_widths(config: Config) -> None:
    lm, vision, head = config.model.language, config.model.vision, config.model.visual_head
    sizes = ("hidden_size", "num_layers", "num_heads", "ffn_hidden_size")
    _positive(lm, "model.language", (*sizes, "vocab_size", "num_kv_heads", "head_dim"))
    _positive(lm, "model.language", ("max_positions", "sliding_window", "rope_theta"))
    _positive(vision, "model.vision", (*sizes, "image_size", "patch_size"))
    _positive(head, "model.visual_head", ("width", "num_layers", "num_heads"))
    for name, part in (("language", lm), ("vision", vision), ("visual_head", head)):
        _positive(part, f"model.{name}", ("norm_eps", "init_std"))
    _require(
        lm.head_dim is not None or lm.hidden_size % lm.num_heads == 0,
        f"model.language.num_heads={lm.num_heads} does not divide hidden_size={lm.hidden_size}; "
        f"use {divisors(lm.hidden_size)}, or set head_dim",
    )
    _require(
        lm.num_heads % lm.kv_heads == 0,
        f"model.language.num_kv_heads={lm.kv_heads} does not divide num_heads={lm.num_heads}; "
        f"use {divisors(lm.num_heads)}",
    )
    _require(
        lm.width_per_head % 2 == 0,
        f"model.language.head_dim={lm.width_per_head} must be even: rotary positions turn pairs; "
        "set head_dim or num_heads",
    )
    _require(
        vision.hidden_size % vision.num_heads == 0,
        f"model.vision.num_heads={vision.num_heads} does not divide "
        f"hidden_size={vision.hidden_size}; use {divisors(vision.hidden_size)}",
    )
    _require(
        head.width % head.heads == 0,
        f"model.visual_head.num_heads={head.heads} does not divide width={head.width}; "
        f"use {divisors(head.width)}",
    )
    _require(vision.grid > 0, f"model.vision.patch_size={vision.patch_size} exceeds image_size")
    _require(
        -vision.num_layers - 1 <= vision.feature_layer <= vision.num_layers,
        f"model.vision.feature_layer={vision.feature_layer} does not exist; hidden states are "
        f"{-vision.num_layers - 1} to {vision.num_layers}",
    )


def _check_rope(lm: LanguageConfig) -> None:
    scaling, where = lm.rope_scaling, "model.language.rope_scaling"
    _positive(scaling, where, ("factor", "original_max_position_embeddings", "attention_factor"))
    _positive(scaling, where, ("low_freq_factor", "beta_slow"))
    _require(
        scaling.rope_type not in ("llama3", "yarn")
        or scaling.original_max_position_embeddings is not None,
        f"{where}.rope_type={scaling.rope_type} needs original_max_position_embeddings: the "
        "positions that the model was trained on before scaling",
    )
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        below, above = getattr(scaling, low), getattr(scaling, high)
        _require(below < above, f"{where}.{low}={below} must be less than {high}={above}")


def _check_experts(lm: LanguageConfig) -> None:
    _positive(lm, "model.language", ("experts_per_token", "expert_ffn_hidden_size"))
    _not_negative(lm, "model.language", ("router_aux_loss_coef",))
    if not lm.is_mixture:
        _require(
            lm.num_experts is None,
            f"model.language.num_experts={lm.num_experts} needs family mixtral or qwen3_moe, got "
            f"{lm.family}; leave it unset",
        )
        return
    _require(
        lm.num_experts is not None and lm.num_experts > 1,
        f"model.language.family={lm.family} needs num_experts >= 2, got {lm.num_experts}",
    )
    _require(
        lm.experts_per_token <= (lm.num_experts or 0),
        f"model.language.experts_per_token={lm.experts_per_token} exceeds "
        f"num_experts={lm.num_experts}; use 1 to {lm.num_experts}",
    )
    _require(
        lm.experts_per_token > 1 or (lm.family == "qwen3_moe" and not lm.norm_topk_prob),
        "model.language.experts_per_token=1 has the weight 1 whatever the router says, so the "
        "router cannot learn; use at least 2, or family qwen3_moe with norm_topk_prob=false",
    )


def _check_overlap(config: Config) -> None:
    """Refuse what looks at gradients, or drops them, before their sums could have begun."""
    t = config.train
    for name, wanted in (
        ("train.cosine_every_steps", t.cosine_every_steps == 0),
        ("precision.fp8.guard_every_steps", config.precision.fp8.guard_every_steps == 0),
        ("train.anomaly.on_nonfinite=skip", t.anomaly.on_nonfinite != "skip"),
        ("train.anomaly.on_spike=skip", t.anomaly.on_spike != "skip"),
    ):
        _require(
            wanted,
            f"train.optim.overlap_grad_reduce=true sums gradients during the backward pass, which "
            f"{name} does not allow; leave one of them out",
        )


def _check_graphs(config: Config) -> None:
    """Refuse a recording that would hold nothing, or of what needs a backward pass."""
    data, way_out = config.data, "set train.cuda_graphs=false"
    _require(
        "vision_encoder" not in config.train.trainable,
        "train.cuda_graphs=true records an encoder without its backward pass, but train.trainable "
        f"names vision_encoder; freeze it, or {way_out}",
    )
    _require(
        data.features == "online",
        "train.cuda_graphs=true records the encoder, but with data.features=cache no step runs it; "
        + way_out,
    )


def _check_train(config: Config) -> None:
    t = config.train
    _require(
        (t.steps is None) != (t.epochs is None),
        f"give exactly one of train.steps (got {t.steps}) and train.epochs (got {t.epochs})",
    )
    _positive(t, "train", ("steps", "epochs", "global_batch", "micro_batch", "threads_per_rank"))
    _positive(t, "train", ("save_every_steps", "keep_checkpoints", "log_every_steps"))
    _not_negative(t, "train", ("eval_every_steps", "cosine_every_steps", "keep_every_steps"))
    _not_negative(t.watchdog, "train.watchdog", ("hang_s", "slow_share"))
    _positive(t.anomaly, "train.anomaly", ("spike_window", "spike_mads"))
    _not_negative(t.anomaly, "train.anomaly", ("max_events",))
    if t.optim.overlap_grad_reduce:
        _check_overlap(config)
    _require(
        not t.compile or config.precision.fp8.recipe == "none",
        f"train.compile=true with precision.fp8.recipe={config.precision.fp8.recipe}: torch cannot "
        "compile products in 8 bits that others make; set train.compile=false",
    )
    if t.cuda_graphs:
        _check_graphs(config)
    _require(bool(t.trainable), f"train.trainable is empty; choose from {', '.join(PARTS)}")
    for part in PARTS:
        _require(t.trainable.count(part) < 2, f"train.trainable names {part} twice; name it once")
    if config.loss.visual_weight == 0 and "visual_head" in t.trainable:
        raise ConfigError(
            "train.trainable names visual_head but loss.visual_weight=0 builds none; "
            "remove it from train.trainable or set a weight"
        )
    _require(
        config.data.packing or t.global_batch % t.micro_batch == 0,
        f"train.global_batch={t.global_batch} is not a multiple of "
        f"train.micro_batch={t.micro_batch}",
    )


def _check_optim(o: OptimConfig) -> None:
    _positive(o, "train.optim", ("lr", "eps"))
    _not_negative(o, "train.optim", ("weight_decay", "clip_grad"))
    for name in ("warmup_fraction", "beta1", "beta2"):
        value = getattr(o, name)
        _require(0 <= value < 1, f"train.optim.{name}={value} must be in [0, 1)")
    _require(0 <= o.min_lr <= o.lr, f"train.optim.min_lr={o.min_lr} must be in [0, lr={o.lr}]")


def _check_data(config: Config) -> None:
    d, positions = config.data, config.model.language.max_positions
    _not_negative(config.run, "run", ("seed",))
    _positive(d, "data", ("max_length", "pack_length", "max_image_pixels", "decode_threads"))
    _not_negative(d, "data", ("prefetch_batches",))
    for name, shares in (
        ("codes_verify_fraction", (d.codes_verify_fraction,)),
        ("codes_max_flip", d.codes_max_flip),
        ("max_bad_share", (d.max_bad_share,)),
        ("parity_max_flip", d.parity_max_flip or (0.0,)),
    ):
        _require(
            bool(shares) and all(0 <= share <= 1 for share in shares),
            f"data.{name}={getattr(d, name)} must be from 0 to 1",
        )
    _require(
        d.features == "online" or "vision_encoder" not in config.train.trainable,
        "data.features=cache holds what a frozen encoder gives, but train.trainable names "
        "vision_encoder; set data.features=online, or freeze it",
    )
    _require(
        d.features == "online" or d.codes == "cache" or config.loss.visual_weight == 0,
        "data.features=cache saves nothing with data.codes=online: images are decoded and encoded "
        "for their codes in every step; set data.codes=cache too, or data.features=online",
    )
    near = difflib.get_close_matches(d.template, TEMPLATES, n=1)
    _require(
        d.template in (*TEMPLATES, "tokenizer") or d.template.endswith(".jinja"),
        f"data.template={d.template!r} is unknown{f' (nearest: {near[0]!r})' if near else ''}; use "
        f"{', '.join(TEMPLATES)}, tokenizer (the chat template in the tokenizer's folder) or the "
        "path of a .jinja file",
    )
    _require(
        d.max_length <= positions,
        f"data.max_length={d.max_length} exceeds model.language.max_positions={positions}; use at "
        "most that, or raise max_positions if the model is meant for it",
    )


def _check_augment(config: Config) -> None:
    augment = config.data.augment
    _require(0 <= augment.flip <= 1, f"data.augment.flip={augment.flip} must be from 0 to 1")
    _require(
        0 < augment.min_crop <= 1,
        f"data.augment.min_crop={augment.min_crop} must be above 0 and at most 1 (the whole image)",
    )
    _require(0 <= augment.colour < 1, f"data.augment.colour={augment.colour} must be in [0, 1)")
    if not augment.is_on:
        return
    _require(
        config.data.codes == "online" or config.loss.visual_weight == 0,
        "data.augment changes images at every step, and cached codes are of the unchanged ones; "
        "set data.codes=online, or leave data.augment out",
    )
    _require(
        config.data.features == "online",
        "data.augment changes images at every step, and cached features are of the unchanged ones; "
        "set data.features=online, or leave data.augment out",
    )
    _require(
        config.model.resolution.mode == "single",
        "data.augment does not know the views of model.resolution.mode="
        f"{config.model.resolution.mode}; leave one of them out",
    )


def _check_sources(config: Config) -> None:
    for split, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for number, source in enumerate(sources):
            where = f"data.{split}[{number}]"
            _positive(source, where, ("weight", "epochs", "max_samples"))
            blended = source.weight is not None or source.epochs != 1.0
            _require(
                not (blended and split == "eval"),
                f"{where}: evaluation meets every sample once; leave out weight and epochs",
            )
            _require(
                source.weight is None or source.epochs == 1.0,
                f"{where} has weight={source.weight} and epochs={source.epochs}; give one of them",
            )
        weighted = [source.weight is not None for source in sources]
        _require(
            all(weighted) or not any(weighted),
            f"data.{split}: {sum(weighted)} of {len(sources)} sources have a weight; give it to "
            "all or none",
        )
        names = [source.name for source in sources if source.name is not None]
        for name in names:
            _require(
                names.count(name) == 1, f"data.{split} has {name!r} twice; set different names"
            )


def _check_loss(config: Config) -> None:
    loss = config.loss
    _require(loss.visual_weight >= 0, f"loss.visual_weight={loss.visual_weight} must be >= 0")
    _require(
        0 < loss.visual_positions <= 1,
        f"loss.visual_positions={loss.visual_positions} must be above 0 and at most 1 (all)",
    )
    if loss.mode == "official":
        for key, got, want in (
            ("loss.visual_positions", loss.visual_positions, 1.0),
            ("loss.target_shift", loss.target_shift, 0),
            ("loss.visual_weight", loss.visual_weight, 1.0),
        ):
            _require(got == want, f"loss.mode='official' fixes {key}={want}; got {got}")


def _check_files(config: Config) -> None:
    _require(
        config.model.text_tokenizer is not None,
        "model.text_tokenizer is not set; give the folder of a language model, its tokenizer.json "
        "or a SentencePiece model",
    )
    _require(
        config.loss.visual_weight == 0 or config.model.visual_tokenizer is not None,
        "model.visual_tokenizer is not set; give a folder written by `asvr tokenizer fit`, "
        "or set loss.visual_weight=0 for the text-only baseline",
    )
    _require(bool(config.data.train), "data.train is empty; give at least one source")
