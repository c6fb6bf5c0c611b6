"""Several ranks fit one tokenizer together."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_asvr.errors import ConfigError
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.model.quantize import LevelReport, fit_codebooks, quantisation_report

pytestmark = pytest.mark.world

SIZES = [16, 6]


def vectors(rank: int) -> Tensor:
    """What one rank reads: clusters that the other rank does not have, and another amount."""
    generator = torch.Generator().manual_seed(rank)
    centres = 20 * torch.randn(4, 5, generator=generator)
    noise = torch.randn(300 + 100 * rank, 5, generator=generator)
    return centres[torch.arange(len(noise)) % 4] + noise


def fit_together() -> tuple[list[Tensor], list[LevelReport]]:
    group, rank = dist.group.WORLD, dist.get_rank()
    mine = vectors(rank)
    books = fit_codebooks(mine.split(64), SIZES, seed=0, group=group)
    for book in books:
        other = book.clone()
        dist.broadcast(other, src=0)
        assert torch.equal(other, book)
    with pytest.raises(ConfigError, match="only 700 vectors"):
        fit_codebooks([mine], [701], seed=0, group=group)
    return books, quantisation_report(mine.split(64), books, group=group)


def test_ranks_end_with_one_tokenizer_that_fits_all_their_vectors():
    books, report = run_ranks(fit_together, world_size=2, timeout_s=120.0)
    assert [tuple(book.shape) for book in books] == [(16, 5), (6, 5)]
    everything = torch.cat([vectors(0), vectors(1)])
    alone = quantisation_report([everything], books)
    for together, single in zip(report, alone, strict=True):
        assert together.mse == pytest.approx(single.mse, rel=1e-6)
        assert together.cosine == pytest.approx(single.cosine, rel=1e-6)
        assert together.perplexity == pytest.approx(single.perplexity)
        assert together.usage == single.usage == 1.0
    assert report[0].mse < 2  # of a variance of 400: both ranks' clusters have codewords
