"""Do pixels from DALI give the same visual tokens as pixels from the PIL reference?

Two decoders that differ by one level of 255 can still choose another nearest codeword, and the
codes are what the model learns. So the pixels and the codes of some images of every kind are
compared (``asvr data parity``), and a run with ``data.parity_max_flip`` does so before it starts.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_asvr.platforms import select

import numpy as np
import torch
from torch import Tensor

from megatron_asvr.config.schema import Config
from megatron_asvr.data import locations, pil
from megatron_asvr.data.decode import Decoder, takes_pil
from megatron_asvr.data.sources import Sources
from megatron_asvr.errors import ConfigError, DataError
from megatron_asvr.model.tokenizer import VisualTokenizer
from megatron_asvr.parallel.collectives import broadcast_object
from megatron_asvr.parallel.groups import Groups

logger = logging.getLogger(__name__)

IMAGES_OF_A_KIND = 32  # compared before a run
BATCH = 32  # images tokenised together

Views = Callable[[Sequence[bytes]], Sequence[Tensor]]  # of encoded images


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How far DALI is from the reference on one kind of images.

    Attributes:
        kind: as in ``gate.kind_of``.
        images: how many were compared.
        decoder: ``dali``, or ``pil`` where PIL decodes the kind, and nothing can differ.
        pixel_max: largest difference of a pixel in any view of an image, of 255.
        pixel_mean: mean difference.
        flips_D: share of the codes of each depth that are others, of all views with codes.
    """

    kind: str
    images: int
    decoder: str
    pixel_max: int
    pixel_mean: float
    flips_D: tuple[float, ...]

    def exceeds(self, limits: Sequence[float]) -> bool:
        """Whether more codes flip than ``limits`` allow: of all depths, or of each.

        Raises:
            ConfigError: there are limits for some depths only.
        """
        depth = len(self.flips_D)
        if len(limits) not in (1, depth):
            raise ConfigError(
                f"data.parity_max_flip has {len(limits)} values and the tokenizer {depth} depths; "
                "give one for all or one for each"
            )
        each = limits if len(limits) == depth else [*limits] * depth
        return any(flip > limit for flip, limit in zip(self.flips_D, each, strict=True))


def measure(
    config: Config,
    sources: Sources,
    tokenizer: VisualTokenizer,
    *,
    device: torch.device,
    images: int = IMAGES_OF_A_KIND,
    reference: Views | None = None,
) -> list[Parity]:
    """The parity of every kind among the good images of some sources, by name.

    Args:
        config: image settings.
        sources: prepared.
        tokenizer: on ``device``.
        device: where DALI decodes, and where codes are computed.
        images: at most so many of a kind, spread evenly.
        reference: what DALI is compared with; PIL by default.

    Raises:
        DataError: an image cannot be read or decoded any more.
    """
    found = []
    for kind, paths in sorted(sources.kinds().items()):
        places = np.linspace(0, len(paths) - 1, min(images, len(paths))).astype(int)
        chosen = [paths[place] for place in places]
        if takes_pil(kind, config.data.pil_kinds):
            none = (0.0,) * tokenizer.depth
            found.append(
                Parity(
                    kind=kind,
                    images=len(chosen),
                    decoder="pil",
                    pixel_max=0,
                    pixel_mean=0.0,
                    flips_D=none,
                )
            )
        else:
            against = reference or _by_pil(config)
            found.append(_compare(config, kind, chosen, tokenizer, device, against))
    return found


def check_parity(config: Config, *, groups: Groups) -> Config:
    """The run as it may start: unchanged, or with the kinds that flip too much left to PIL.

    Nothing happens without ``data.parity_max_flip``. All ranks take part.

    Args:
        config: the run.
        groups: process groups of the layout.

    Raises:
        DataError: a kind flips too much and ``data.on_parity`` is ``refuse``.
    """
    limits = config.data.parity_max_flip
    if not limits or not config.loss.visual_weight:
        return config
    device = select()[0].device
    sources = Sources(config, config.data.train, device=device)
    sources.prepare(group=groups.world)
    found: list[Parity] | None = None
    if groups.rank == 0:
        tokenizer = VisualTokenizer.load(str(config.model.visual_tokenizer)).to(device)
        found = measure(config, sources, tokenizer, device=device)
        for line in table(found):
            logger.info("%s", line)
    over = [
        each.kind for each in broadcast_object(found, group=groups.world) if each.exceeds(limits)
    ]
    if not over:
        return config
    routed = tuple(dict.fromkeys((*config.data.pil_kinds, *over)))
    if config.data.on_parity == "refuse":
        raise DataError(refusal(over, routed))
    if groups.rank == 0:
        logger.warning("left to PIL, because too many of their codes flip: %s", ", ".join(over))
    return replace(config, data=replace(config.data, pil_kinds=routed))


def refusal(over: Sequence[str], kinds: Sequence[str]) -> str:
    """What is wrong with kinds that flip too much, and the way out.

    Args:
        over: those kinds.
        kinds: what ``data.pil_kinds`` would have to be.
    """
    return (
        f"images of the kinds {', '.join(over)} get other visual tokens from DALI's pixels than "
        "from PIL's, beyond data.parity_max_flip; set data.pil_kinds="
        f"[{', '.join(kinds)}], data.on_parity=pil, or a larger limit"
    )


def table(found: Sequence[Parity]) -> list[str]:
    """Lines for a person: a heading and one a kind."""
    lines = [f"{'kind':20} {'images':>6} {'decoder':>7} {'max':>4} {'mean':>6}  codes that flip"]
    for each in found:
        flips = " ".join(f"{flip:6.2%}" for flip in each.flips_D)
        lines.append(
            f"{each.kind:20} {each.images:6} {each.decoder:>7} {each.pixel_max:4} "
            f"{each.pixel_mean:6.3f}  {flips}"
        )
    return lines


def _by_pil(config: Config) -> Views:
    def views(encoded: Sequence[bytes]) -> list[Tensor]:
        return [
            torch.from_numpy(
                pil.decode_views(
                    each,
                    image_size=config.model.vision.image_size,
                    fit=config.data.image_fit,
                    resolution=config.model.resolution,
                )
            )
            for each in encoded
        ]

    return views


@torch.no_grad()
def _compare(
    config: Config,
    kind: str,
    paths: Sequence[str],
    tokenizer: VisualTokenizer,
    device: torch.device,
    reference: Views,
) -> Parity:
    dali, resolution = Decoder(config, device).dali, config.model.resolution
    worst, total, num_views, num_coded = 0, 0.0, 0, 0
    flips_D = torch.zeros(tokenizer.depth, dtype=torch.float64)
    for start in range(0, len(paths), BATCH):
        encoded = [locations.read(path) for path in paths[start : start + BATCH]]
        got = dali.views(encoded)
        want = [views.to(device) for views in reference(encoded)]
        for mine, theirs in zip(torch.cat(got).int(), torch.cat(want).int(), strict=True):
            difference = (mine - theirs).abs()
            worst = max(worst, int(difference.max()))
            total += float(difference.double().mean())
            num_views += 1
        if resolution.mode == "s2":  # codes are of the base scale
            got, want = [views[:1] for views in got], [views[:1] for views in want]
        for mine, theirs in zip(_codes(got, tokenizer), _codes(want, tokenizer), strict=True):
            flips_D += (mine != theirs).double().mean(0).cpu()
            num_coded += 1
    return Parity(
        kind=kind,
        images=len(paths),
        decoder="dali",
        pixel_max=worst,
        pixel_mean=total / num_views,
        flips_D=tuple((flips_D / num_coded).tolist()),
    )


def _codes(views: Sequence[Tensor], tokenizer: VisualTokenizer) -> Iterator[Tensor]:
    """Codes [N, D] of each view of some images, a batch of views at a time."""
    for pixels in torch.cat(tuple(views)).split(BATCH):
        yield from tokenizer.encode((pixels.float() - pil.PIXEL_MEAN) / pil.PIXEL_STD)
