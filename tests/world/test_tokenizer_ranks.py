"""Several ranks fit one tokenizer together: the one that a single process fits."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from megatron_asvr.config.schema import SourceConfig
from megatron_asvr.errors import ConfigError, LaunchError
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.model.kmeans import fit_codebooks
from megatron_asvr.model.quantize import LevelReport, quantisation_report
from megatron_asvr.model.tokenizer import VisualTokenizer
from megatron_asvr.train import fit_sample
from megatron_asvr.train.fit import FitRequest, fit_tokenizer

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
    blocks = {2 * n + rank: rows.clone() for n, rows in enumerate(mine.split(64))}
    books = fit_codebooks(blocks, SIZES, seed=0, group=group)
    for book in books:
        other = book.clone()
        dist.broadcast(other, src=0)
        assert torch.equal(other, book)
    with pytest.raises(ConfigError, match="only 700 vectors"):
        fit_codebooks({rank: mine.clone()}, [701], seed=0, group=group)
    return books, quantisation_report(mine.split(64), books, group=group)


def test_ranks_end_with_the_tokenizer_of_one_process() -> None:
    books, report = run_ranks(fit_together, world_size=2, timeout_s=120.0)
    assert [tuple(book.shape) for book in books] == [(16, 5), (6, 5)]
    shares = [list(enumerate(vectors(rank).split(64))) for rank in range(2)]
    blocks = {2 * n + rank: rows for rank, share in enumerate(shares) for n, rows in share}
    alone = fit_codebooks({n: rows.clone() for n, rows in blocks.items()}, SIZES, seed=0)
    assert all(torch.equal(*pair) for pair in zip(books, alone, strict=True))
    assert report == quantisation_report(blocks.values(), books)
    assert report[0].mse < 2  # of a variance of 400: both ranks' clusters have codewords
    assert report[0].usage == report[1].usage == 1.0


def fit(folder: str, out: str) -> dict[str, Any]:
    """Fit to the images in ``folder``, in blocks of three, keeping half of their patches."""
    request = FitRequest(
        vision=f"{folder}/siglip",
        sources=(SourceConfig(path=f"{folder}/images", format="images"),),
        out=out,
        codebook_sizes=(8, 4),
        max_vectors=24,
        iters=3,
        batch=3,
    )
    return fit_tokenizer(request)


def fit_until(folder: str, out: str, entries: int) -> None:
    """The same, killed when so many files have been kept."""
    kept = []

    def count(path: Path, content: bytes) -> None:
        kept.append(path)
        if len(kept) > entries:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, content)

    write, fit_sample._save_bytes = fit_sample._save_bytes, count
    fit(folder, out)


def test_a_killed_fit_goes_on_and_any_number_of_ranks_gives_one_tokenizer(tmp_path: Path) -> None:
    folder = str(tmp_path)
    make_images(tmp_path)
    wanted = run_ranks(fit, (folder, f"{folder}/one"), 1, timeout_s=120)
    assert (wanted["num_images"], wanted["num_vectors"], wanted["num_vectors_of_all"]) == (
        12, 24, 48,
    )  # fmt: skip
    assert wanted["num_bad_images"] == 1
    assert not (tmp_path / "one" / "unfinished").exists()
    for world in (2, 5):  # five: a rank without a block
        assert run_ranks(fit, (folder, f"{folder}/{world}"), world, timeout_s=120) == wanted
    for entries in (3, 8):  # of settings and 4 blocks, and 2 x 4 iterations
        with pytest.raises(LaunchError, match="SIGKILL"):
            run_ranks(fit_until, (folder, f"{folder}/killed", entries), 1, timeout_s=120)
    assert {p.name for p in (tmp_path / "killed" / "unfinished").iterdir()} >= {"settings.json"}
    report = run_ranks(fit, (folder, f"{folder}/killed"), 2, timeout_s=120)
    assert report == wanted
    VisualTokenizer.load(tmp_path / "killed")


def make_images(folder: Path) -> None:
    """Twelve images and a broken one, and a Hugging Face folder of an encoder."""
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = generator.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:02d}.png")
    (folder / "images" / "bad.png").write_bytes(b"no image")
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    form = {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    SiglipVisionModel(SiglipVisionConfig(**sizes, **form)).save_pretrained(folder / "siglip")
