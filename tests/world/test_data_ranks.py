"""Ranks share the check of the images, agree about the bad ones and replace samples alike."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_asvr.data.cache import CodeCache
from megatron_asvr.data.collate import View
from megatron_asvr.data.loader import Loader
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.launch.local import run_ranks
from tests.unit.data_corpus import TEXTS, ask, config
from tools.make_dirty_images import bad_images, good_images

pytestmark = pytest.mark.world
BAD = ("truncated.jpg", "payload.png", "html.jpg")


def corpus(folder: Path) -> None:
    """Eight good and three bad records; bad ones come between good ones."""
    files = list(good_images())[:8]
    refused = dict(bad_images())
    for number, name in enumerate(BAD):
        files.insert(3 * number, (name, refused[name]))
    records = []
    for name, data in files:
        (folder / name).write_bytes(data)
        records.append({"id": name, "image": name, "conversations": ask("<image>What?", "red")})
    (folder / "train.json").write_text(json.dumps(records))
    TextTokenizer.train(TEXTS, folder / "tokenizer.model", vocab_size=420)


def compare_ranks(folder: str) -> None:
    """Runs on every rank: two data-parallel ranks, each with two ranks that share its images."""
    rank = dist.get_rank()
    made = Loader(
        config(
            data__train=[{"path": f"{folder}/train.json"}],
            data__cache_dir=f"{folder}/cache",
            train__micro_batch=2,
        ),
        TextTokenizer(f"{folder}/tokenizer.model"),
        split="train",
        view=View(dp_rank=rank // 2, dp=2, encoder_rank=rank % 2, encoder_world=2),
        device=torch.device("cpu"),
    )
    made.prepare(group=dist.group.WORLD)
    reports = [None] * 4
    dist.all_gather_object(reports, (made.report(), made.image_keys()))
    assert all(report == reports[0] for report in reports)
    assert set(reports[0][0]["bad_images"]) == {f"{folder}/{name}" for name in BAD}
    for step in range(6):
        seen = [None] * 4
        batches = [(b.sample_ids, b.image_share, b.tokens_BS.tolist()) for b in made.step(step)]
        dist.all_gather_object(seen, batches)
        ids = [[i for batch, _, _ in part for i in batch] for part in seen]
        assert ids[0] == ids[1]
        assert ids[2] == ids[3]
        assert not set(ids[0] + ids[2]) & set(BAD)
        for left, right in ((seen[0], seen[1]), (seen[2], seen[3])):
            assert [batch[2] for batch in left] == [batch[2] for batch in right]
            assert [batch[1] for batch in left] == [(0, 1)] * len(left)
            assert [batch[1] for batch in right] == [(1, 2)] * len(right)
    made.close()


def fill_cache(folder: str) -> None:
    """Runs on every rank: each writes the codes of its share of the images."""
    rank, world = dist.get_rank(), dist.get_world_size()
    cache = CodeCache(folder, "f" * 64, num_patches=2, codebook_sizes=(7, 7))
    keys = [f"{number:064x}" for number in range(10)]
    missing = cache.missing(keys)
    assert missing == keys
    dist.barrier()
    mine = missing[rank::world]
    cache.write(mine, torch.full((len(mine), 2, 2), rank).numpy())
    dist.barrier()
    assert cache.missing(keys) == []
    assert [int(cache.get(key)[0, 0]) for key in keys] == [n % world for n in range(10)]


def test_ranks_agree_about_bad_images_and_samples(tmp_path):
    corpus(tmp_path)
    run_ranks(compare_ranks, (str(tmp_path),), world_size=4, timeout_s=120)


def test_ranks_fill_one_code_cache(tmp_path):
    run_ranks(fill_cache, (str(tmp_path),), world_size=3, timeout_s=60)
