"""Any-resolution models as LLaVA-NeXT: which have that stock form, and its settings both ways."""

from typing import Any

from megatron_asvr.config.schema import ModelConfig, ResolutionConfig
from megatron_asvr.errors import ConversionError

NEXT_ARCHITECTURE = "LlavaNextForConditionalGeneration"
NEXT_TYPE = "llava_next"


def stock_pinpoints(model: ModelConfig) -> list[list[int]] | None:
    """``image_grid_pinpoints`` of the stock form; None for plain LLaVA.

    Raises:
        ConversionError: the model has no stock form.
    """
    resolution = model.resolution
    if resolution.mode == "single":
        return None
    if resolution.mode == "s2":
        raise ConversionError(
            "model.resolution.mode=s2 has no stock form: no class of transformers joins the "
            "features of several scales; train with model.resolution.mode=single, or anyres with "
            "newline and unpad, to export it; or use kind=text for the language model alone"
        )
    lacking = [name for name in ("newline", "unpad") if not getattr(resolution, name)]
    if lacking:
        raise ConversionError(
            f"model.resolution.{lacking[0]}=false has no stock form: {NEXT_ARCHITECTURE} always "
            "leaves out padding and ends every row with image_newline, so it would see other "
            "sequences than this model was trained on; train (a last stage is enough) with "
            "model.resolution.newline=true and model.resolution.unpad=true to export it, or use "
            "kind=text for the language model alone"
        )
    side = model.vision.image_size
    return [[rows * side, columns * side] for rows, columns in resolution.grids]


def resolution_from(config: Any, where: str) -> ResolutionConfig:
    """Our settings of a stock LLaVA or LLaVA-NeXT model.

    Args:
        config: its transformers configuration.
        where: for messages.

    Raises:
        ConversionError: the grids are not made of whole tiles.
    """
    if config.model_type != NEXT_TYPE:
        return ResolutionConfig()
    side = config.vision_config.image_size
    pinpoints = [tuple(pinpoint) for pinpoint in config.image_grid_pinpoints]
    if any(len(p) != 2 or p[0] % side or p[1] % side or min(p) < side for p in pinpoints):
        raise ConversionError(
            f"{where}: image_grid_pinpoints {pinpoints} are no multiples of image_size={side}"
        )
    grids = tuple(dict.fromkeys((height // side, width // side) for height, width in pinpoints))
    return ResolutionConfig(mode="anyres", grids=grids, newline=True, unpad=True)


def same_images(a: ResolutionConfig, b: ResolutionConfig) -> bool:
    """Whether two models see images alike."""
    return a == b or a.mode == b.mode == "single"
