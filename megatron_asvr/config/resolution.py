"""Checks of the resolution settings, and of what they ask of the other ones."""

from megatron_asvr.config.schema import Config
from megatron_asvr.errors import ConfigError


def check_resolution(config: Config) -> None:
    """Return when images can be cut as ``model.resolution`` says.

    Raises:
        ConfigError: a setting cannot work, alone or with another one.
    """
    r, where = config.model.resolution, "model.resolution"
    if r.mode != "anyres":
        for name in ("newline", "unpad"):
            if getattr(r, name):
                raise ConfigError(f"{where}.{name}=true needs {where}.mode=anyres, got {r.mode}")
    if r.mode == "single":
        return
    if config.loss.mode == "official":
        raise ConfigError(
            f"{where}.mode={r.mode} needs loss.mode=exact: the official code has one size of images"
        )
    if r.mode == "anyres":
        _check_anyres(config)
    rising = list(r.scales) == sorted(set(r.scales))
    if r.mode == "s2" and (len(r.scales) < 2 or r.scales[0] != 1 or not rising):
        raise ConfigError(
            f"{where}.scales={list(r.scales)} must begin with 1, the scale that codes come from, "
            "and rise, as [1, 2, 3] does"
        )


def _check_anyres(config: Config) -> None:
    r, where = config.model.resolution, "model.resolution"
    good = [grid for grid in r.grids if len(grid) == 2 and min(grid) >= 1]
    if not r.grids or len(good) < len(r.grids) or len(set(good)) < len(good):
        raise ConfigError(
            f"{where}.grids={[list(grid) for grid in r.grids]} must be pairs of rows and columns "
            "of tiles, at least one pair and none twice"
        )
    if config.data.image_fit != "square":
        raise ConfigError(
            f"{where}.mode=anyres stretches the whole image to its first view, so it needs "
            f"data.image_fit=square, got {config.data.image_fit}"
        )
    vision = config.model.vision
    for rows, columns in r.grids:
        newlines = rows * vision.grid if r.newline else 0
        most = (1 + rows * columns) * vision.num_patches + newlines
        if most >= config.data.max_length:
            raise ConfigError(
                f"an image in a grid of {rows} x {columns} tiles takes up to {most} positions, but "
                f"data.max_length={config.data.max_length}, and no image is ever cut; use at least "
                f"{most + 1}, or leave [{rows}, {columns}] out of {where}.grids"
            )
