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
