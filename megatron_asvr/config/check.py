"""Checks across settings: everything that can be known to fail before any work is done."""

from collections.abc import Iterable

from megatron_asvr.config.schema import PARTS, Config, OptimConfig
from megatron_asvr.errors import ConfigError


def check(config: Config) -> Config:
    """The same configuration, after every check across its settings.

    Raises:
        ConfigError: the first setting that cannot work, with the values that would.
    """
    _check_widths(config)
    _check_parallel(config)
    _check_train(config)
    _check_optim(config.train.optim)
    _check_data(config)
    _check_loss(config)
    _check_files(config)
    return config


def check_world(config: Config, world_size: int) -> int:
    """Data-parallel degree of the world, after checking that the batch divides over it.

    Raises:
        ConfigError: the world or the global batch does not divide.
    """
    p = config.parallel
    model = p.tp * p.pp * p.cp
    if world_size % model:
        raise ConfigError(
            f"{world_size} ranks cannot hold parallel.tp*pp*cp={model}; use a multiple of {model}"
        )
    dp = world_size // model
    share = dp * config.train.micro_batch
    if config.train.global_batch % share:
        raise ConfigError(
            f"train.global_batch={config.train.global_batch} is not a multiple of "
            f"data-parallel size {dp} x train.micro_batch={config.train.micro_batch}; "
            f"use a multiple of {share}"
        )
    if config.loss.mode == "official" and dp > 1:
        raise ConfigError(
            f"loss.mode='official' takes means per micro-batch, so it is defined for one "
            f"data-parallel rank only; got {dp}. Use loss.mode=exact, or {model} ranks"
        )
    return dp


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


def _divisors(*numbers: int) -> str:
    return ", ".join(str(d) for d in range(1, min(numbers) + 1) if not any(n % d for n in numbers))


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
        f"use {_divisors(lm.hidden_size)}, or set head_dim",
    )
    _require(
        lm.num_heads % lm.kv_heads == 0,
        f"model.language.num_kv_heads={lm.kv_heads} does not divide num_heads={lm.num_heads}; "
        f"use {_divisors(lm.num_heads)}",
    )
    _require(
        lm.width_per_head % 2 == 0,
        f"model.language.head_dim={lm.width_per_head} must be even: rotary positions turn pairs; "
        "set head_dim or num_heads",
    )
    _require(
        vision.hidden_size % vision.num_heads == 0,
        f"model.vision.num_heads={vision.num_heads} does not divide "
        f"hidden_size={vision.hidden_size}; use {_divisors(vision.hidden_size)}",
    )
    _require(
        head.width % head.heads == 0,
        f"model.visual_head.num_heads={head.heads} does not divide width={head.width}; "
        f"use {_divisors(head.width)}",
    )
    _require(vision.grid > 0, f"model.vision.patch_size={vision.patch_size} exceeds image_size")
    _require(
        -vision.num_layers - 1 <= vision.feature_layer <= vision.num_layers,
        f"model.vision.feature_layer={vision.feature_layer} does not exist; hidden states are "
        f"{-vision.num_layers - 1} to {vision.num_layers}",
    )


def _check_parallel(config: Config) -> None:
    p, lm = config.parallel, config.model.language
    _positive(p, "parallel", ("tp", "pp", "cp", "vpp"))
    for name in ("pp", "cp"):
        _require(
            getattr(p, name) == 1,
            f"parallel.{name}={getattr(p, name)} is not supported yet; use 1 and raise tp or "
            "the number of ranks",
        )
    _require(p.vpp is None, f"parallel.vpp={p.vpp} needs parallel.pp > 1; leave it unset")
    if p.tp > 1:
        for key, value in (("num_heads", lm.num_heads), ("num_kv_heads", lm.kv_heads)):
            _require(
                value % p.tp == 0,
                f"parallel.tp={p.tp} does not divide model.language.{key}={value}; "
                f"use {_divisors(lm.num_heads, lm.kv_heads)}",
            )
        for key, value in (
            ("language.ffn_hidden_size", lm.ffn_hidden_size),
            ("language.hidden_size", lm.hidden_size),
            ("visual_head.width", config.model.visual_head.width),
        ):
            _require(
                value % p.tp == 0,
                f"parallel.tp={p.tp} does not divide model.{key}={value}; use {_divisors(value)}",
            )
    _require(not p.sp or p.tp > 1, "parallel.sp=true needs parallel.tp > 1; set sp=false")


def _check_train(config: Config) -> None:
    t = config.train
    _require(
        (t.steps is None) != (t.epochs is None),
        f"give exactly one of train.steps (got {t.steps}) and train.epochs (got {t.epochs})",
    )
    _positive(t, "train", ("steps", "epochs", "global_batch", "micro_batch", "threads_per_rank"))
    _positive(t, "train", ("save_every_steps", "keep_checkpoints", "log_every_steps"))
    _not_negative(t, "train", ("eval_every_steps", "cosine_every_steps"))
    _require(bool(t.trainable), f"train.trainable is empty; choose from {', '.join(PARTS)}")
    for part in PARTS:
        _require(t.trainable.count(part) < 2, f"train.trainable names {part} twice; name it once")
    if config.loss.visual_weight == 0 and "visual_head" in t.trainable:
        raise ConfigError(
            "train.trainable names visual_head but loss.visual_weight=0 builds none; "
            "remove it from train.trainable or set a weight"
        )
    _require(
        t.global_batch % t.micro_batch == 0,
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
    _positive(d, "data", ("max_length", "max_image_pixels", "decode_threads"))
    _not_negative(d, "data", ("prefetch_batches",))
    _require(
        d.max_length <= positions,
        f"data.max_length={d.max_length} exceeds model.language.max_positions={positions}; use at "
        "most that, or raise max_positions if the model is meant for it",
    )


def _check_loss(config: Config) -> None:
    loss = config.loss
    _require(loss.visual_weight >= 0, f"loss.visual_weight={loss.visual_weight} must be >= 0")
    if loss.mode == "official":
        for key, got, want in (
            ("loss.target_shift", loss.target_shift, 0),
            ("loss.visual_weight", loss.visual_weight, 1.0),
        ):
            _require(got == want, f"loss.mode='official' fixes {key}={want}; got {got}")


def _check_files(config: Config) -> None:
    _require(
        config.model.text_tokenizer is not None,
        "model.text_tokenizer is not set; give the path of a SentencePiece model",
    )
    _require(
        config.loss.visual_weight == 0 or config.model.visual_tokenizer is not None,
        "model.visual_tokenizer is not set; give a folder written by `asvr tokenizer fit`, "
        "or set loss.visual_weight=0 for the text-only baseline",
    )
    _require(bool(config.data.train), "data.train is empty; give at least one source")
