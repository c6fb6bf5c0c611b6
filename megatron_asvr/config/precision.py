"""Checks of the precision: what can be known without a device and without the codebooks."""

from megatron_asvr.config.schema import Config
from megatron_asvr.errors import ConfigError


def check_precision(config: Config) -> None:
    """Return when the settings of ``precision`` fit one another.

    Raises:
        ConfigError: the first one that cannot work.
    """
    fp8, where = config.precision.fp8, "precision.fp8"
    for name, least in (("margin", 0), ("history", 1), ("guard_every_steps", 0)):
        if getattr(fp8, name) < least:
            raise ConfigError(f"{where}.{name}={getattr(fp8, name)} must be at least {least}")
    if not -1 <= fp8.guard_min_cosine < 1:
        raise ConfigError(
            f"{where}.guard_min_cosine={fp8.guard_min_cosine} must be from -1 (never) to below 1"
        )
    if fp8.weights and (problem := _weights_problem(config)) is not None:
        raise ConfigError(f"{where}.weights=true {problem}; set it to false")
    if fp8.recipe == "none" and fp8.guard_every_steps:
        raise ConfigError(
            f"{where}.guard_every_steps={fp8.guard_every_steps} with recipe=none: nothing "
            "multiplies in 8 bits that could be compared; set it to 0, or choose a recipe"
        )
    if fp8.recipe == "delayed" and fp8.guard_every_steps and not fp8.emulate:
        raise ConfigError(
            f"{where}.guard_every_steps={fp8.guard_every_steps} with recipe=delayed: what the "
            "guard computes would enter Transformer Engine's history of largest values. Set it to "
            "0, choose another recipe, or emulate=true"
        )
    if fp8.recipe != "none" and fp8.emulate and config.precision.backend == "te":
        raise ConfigError(
            f"{where}.emulate=true runs on megatron-core's own layers, and precision.backend=te "
            "asks for Transformer Engine's; leave one of them out"
        )


def _weights_problem(config: Config) -> str | None:
    """Why weights cannot be kept in 8 bits; None when they can."""
    fp8, train = config.precision.fp8, config.train
    if fp8.recipe == "none" or fp8.emulate:
        return "is done by Transformer Engine alone, and it multiplies nothing here"
    if fp8.recipe == "mxfp8":
        return "does not go with recipe=mxfp8, whose weights megatron-core gathers in bf16"
    if not train.optim.distributed:
        return "needs train.optim.distributed=true, which holds the weights in fp32"
    if "language_model" not in train.trainable:
        return (
            "would round the language model for good, since train.trainable does not name it and "
            "nothing holds its weights in more bits"
        )
    if fp8.guard_every_steps:
        return "leaves the guard (guard_every_steps) nothing exact to compare with"
    return None
