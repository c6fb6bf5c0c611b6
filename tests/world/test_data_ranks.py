"""Ranks share the check of the images, agree about the bad ones, which hold places alike."""

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
from megatron_asvr.parallel.collectives import gather_objects
from megatron_asvr.parallel.groups import initialize
from megatron_asvr.parallel.plan import make_plan
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
            images = [len(batch[0]) for batch in left]
            assert [batch[1] for batch in left] == [(0, n // 2) for n in images]
            assert [batch[1] for batch in right] == [(n // 2, n) for n in images]
    made.close()


def compare_layout(folder: str) -> None:
    """Runs on every rank of TP2 x CP2: together they hold every image and column, once."""
    settings = config(
        data__train=[{"path": f"{folder}/train.json"}],
        data__cache_dir=f"{folder}/cache",
        data__packing=True,
        data__max_length=64,
        parallel__tp=2,
        parallel__cp=2,
        parallel__sp=True,
    )
    groups = initialize(make_plan(settings, 4))
    text = TextTokenizer(f"{folder}/tokenizer.model")
    view = View(
        cp_rank=groups.cp_rank,
        encoder_rank=groups.tp_cp.rank(),
        encoder_world=groups.tp_cp.size(),
    )
    made = Loader(settings, text, split="train", view=view, device=torch.device("cpu"))
    made.prepare(group=groups.world)
    alone = Loader(settings, text, split="train", device=torch.device("cpu"))
    alone.prepare()
    for step in range(3):
        for batch, whole in zip(made.step(step), alone.step(step), strict=True):
            assert batch.sample_ids == whole.sample_ids
            assert torch.equal(batch.index_BS, whole.index_BS)
            pixels = gather_objects(batch.pixel_values_ICHW, group=groups.tp_cp)
            assert torch.equal(torch.cat(pixels), whole.pixel_values_ICHW)
            targets = gather_objects(batch.num_visual_targets, group=groups.cp)
            assert sum(targets) == 4 * batch.num_images
            tokens_BS = torch.cat(gather_objects(batch.tokens_BS, group=groups.cp), 1)
            assert torch.equal(tokens_BS[:, : whole.tokens_BS.shape[1]], whole.tokens_BS)
            order = batch.index_BS.argsort(1)
            images = tokens_BS.gather(1, order) == text.image_id
            assert images.sum() == 4 * batch.num_images
            for tokens in gather_objects(batch.tokens_BS, group=groups.tp):
                assert torch.equal(tokens, batch.tokens_BS)
    made.close()
    alone.close()


def count_micro_batches(folder: str) -> None:
    """Runs on every rank: evaluation of few records gives every rank as many micro-batches."""
    rank = dist.get_rank()
    for packing in (False, True):
        sources = [{"path": f"{folder}/train.json"}]
        made = Loader(
            config(
                data__eval=sources,
                data__cache_dir=f"{folder}/cache",
                data__packing=packing,
                train__global_batch=9,
            ),
            TextTokenizer(f"{folder}/tokenizer.model"),
            split="eval",
            view=View(dp_rank=rank, dp=4),
            device=torch.device("cpu"),
        )
        made.prepare(group=dist.group.WORLD)
        met = []
        for step in range(made.steps):
            batches = made.step(step)
            seen = gather_objects([b.sample_ids for b in batches], group=dist.group.WORLD)
            assert len({len(part) for part in seen}) == 1
            met.extend(i for part in seen for ids in part for i in ids)
        assert made.steps == 2
        assert len(met) == len(set(met)) == 8
        made.close()


def fill_cache(folder: str) -> None:
    """Runs on every rank: each writes the codes of its share of the images."""
    rank, world = dist.get_rank(), dist.get_world_size()
    cache = CodeCache(folder, {"name": "f"}, num_patches=2, codebook_sizes=(7, 7))
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


def test_tensor_and_context_parallel_ranks_share_images_and_columns(tmp_path):
    corpus(tmp_path)
    run_ranks(compare_layout, (str(tmp_path),), world_size=4, timeout_s=120)


def test_ranks_have_as_many_micro_batches_when_data_run_out(tmp_path):
    corpus(tmp_path)
    run_ranks(count_micro_batches, (str(tmp_path),), world_size=4, timeout_s=120)


def test_ranks_fill_one_code_cache(tmp_path):
    run_ranks(fill_cache, (str(tmp_path),), world_size=3, timeout_s=300)
