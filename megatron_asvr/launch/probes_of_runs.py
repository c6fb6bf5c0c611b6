"""Probes that start ranks or look at a user's run: ``asvr gpu-smoke CONFIG``."""

import dataclasses
import tempfile
from pathlib import Path

from megatron_asvr.platforms import mcore, select  # noqa: F401  (mcore prepares the process)

import torch.distributed as dist

from megatron_asvr.config.schema import Config, ParallelConfig
from megatron_asvr.data.decode import Decoder
from megatron_asvr.data.sources import Sources
from megatron_asvr.errors import ConfigError
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.launch.preflight import all_reduce_gb_s
from megatron_asvr.launch.probes import CPU, LEAST_SHARE, Found, UnfitError
from megatron_asvr.launch.rank import init_rank, leave_group
from megatron_asvr.model.tokenizer import VisualTokenizer
from megatron_asvr.train.certify import Request, certify
from megatron_asvr.train.excerpt import make_excerpt
from megatron_asvr.train.parity import measure

FLIP_IMAGES = 64  # whose tokens are compared


def all_reduce() -> Found:
    """Bandwidth between the GPUs of this node."""
    platform = select()[0]
    count = max(2, platform.num_gpus)
    speed = run_ranks(_bandwidth, (), count, timeout_s=120.0)
    link = platform.link_gb_s() or 0
    return Found(
        ok=speed >= LEAST_SHARE * link,
        measured=f"{speed:.1f} GB/s of {count} ranks",
        expected=f"right sums, {LEAST_SHARE:.0%} of {link:g} (data sheet; 0: unknown)",
    )


def all_reduce_nodes() -> Found:
    """Bandwidth between all ranks that a launcher started."""
    here = init_rank(timeout_s=120.0)
    speed = _bandwidth()
    leave_group()
    measured = f"{speed:.1f} GB/s of {here.world_size} ranks"
    return Found(ok=speed > 0, measured=measured, expected="right sums")


def _bandwidth() -> float:
    platform = select()[0]
    mib = 512 if platform.num_gpus else None  # short messages do not fill NVLink
    return all_reduce_gb_s(platform, dist.get_world_size(), mib)


def tensor_certificate(config: Config) -> Found:
    """A small form of a run over 8 tensor-parallel ranks, or as many as there are GPUs for."""
    count = max(2, select()[0].num_gpus)
    return _certified(config, tp=max(n for n in (2, 4, 8) if n <= count))


def pipeline_certificate(config: Config) -> Found:
    """A small form of a run in two stages."""
    return _certified(config, pp=2)


def _certified(config: Config, **degrees: int) -> Found:
    """The layout's losses and gradients, in bf16, against one rank's."""
    request = Request(
        config=dataclasses.replace(config, parallel=ParallelConfig(**degrees)),
        dp=1,
        precision="bf16",
        shrink=True,
        prepare=True,
    )
    try:
        verdict = certify(request, run_ranks).verdict
    except ConfigError as error:  # the run has no such layout, or lacks its inputs
        raise UnfitError(str(error)) from None
    furthest = max(verdict.rows, key=lambda row: row.difference / row.bound if row.bound else 0)
    layout = ",".join(f"{name}={degree}" for name, degree in degrees.items())
    told = f"{layout}: {furthest.name} differs most, by {furthest.difference:.1e}"
    return Found(
        ok=verdict.ok,
        measured="; ".join([told, *verdict.places]),
        expected=f"at most {furthest.bound:.1e} from one rank's",
    )


def token_flips(config: Config) -> Found:
    """Visual tokens of a run's images from DALI here against those from DALI on the CPU."""
    limits = config.data.parity_max_flip
    if not config.loss.visual_weight:
        raise UnfitError("the run has no visual loss, so no visual tokens")
    few = dataclasses.replace(config.train, global_batch=FLIP_IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(config, train=few)
        run = make_excerpt(run, Path(folder), prepare=True).config
        device = select()[0].device
        sources = Sources(run, run.data.train, device=device)
        sources.prepare()
        tokenizer = VisualTokenizer.load(str(run.model.visual_tokenizer)).to(device)
        reference = Decoder(run, CPU).views
        kinds = measure(run, sources, tokenizer, device=device, reference=reference)
    flips = (
        f"{each.images} {each.kind}: {' '.join(f'{flip:.2%}' for flip in each.flips_D)}"
        for each in kinds
    )
    bound = f"at most {', '.join(map(str, limits))}" if limits else "data.parity_max_flip is unset"
    over = any(each.exceeds(limits) for each in kinds) if limits else False
    return Found(ok=not over, measured="; ".join(flips), expected=bound)
