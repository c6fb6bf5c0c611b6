"""Steps are a pure function of (seed, step), bad samples are replaced alike on every rank."""

import json
import shutil
import threading

from megatron_asvr.platforms.cpu import CpuPlatform

import numpy as np
import pytest
import torch

from megatron_asvr.data.cache import CodeCache
from megatron_asvr.data.collate import WHOLE, View
from megatron_asvr.data.index import build
from megatron_asvr.data.loader import Loader
from megatron_asvr.data.pixels import PixelStore
from megatron_asvr.data.sample import SampleBuilder
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.errors import DataError
from tests.unit.data_corpus import TEXTS, ask, config
from tools.make_dirty_images import bad_images, good_images

CPU = torch.device("cpu")
NUM = 24  # records, every fourth without an image
BAD = {3: "truncated.jpg", 9: "payload.png", 10: "bomb.png", 14: None}  # None: the file is missing


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("loader") / "tokenizer.model"
    return TextTokenizer.train(TEXTS, path, vocab_size=420)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("clean"), {})


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("dirty"), BAD)


def corpus(folder, bad):
    refused = dict(bad_images())
    records = []
    for number, (_, data) in zip(range(NUM), good_images(), strict=False):
        record = {"id": f"r{number}", "conversations": ask(f"What color {number}?", "red")}
        if number % 4 or number in bad:
            record["image"] = f"{number}.img"
            record["conversations"][0]["value"] = f"<image>\nWhat color {number}?"
            data = refused.get(bad[number]) if number in bad else data
            if data is not None:
                (folder / f"{number}.img").write_bytes(data)
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def loader(folder, tokenizer, *, split="train", view=WHOLE, codes=None, **changes):
    sources = [{"path": str(folder / "train.json")}]
    where = {"data__cache_dir": str(folder / "cache"), **changes}
    settings = config(data__train=sources, data__eval=sources, **where)
    made = Loader(
        settings,
        tokenizer,
        split=split,
        view=view,
        codes=codes,
        device=CPU,
    )
    made.prepare()
    return made


def ids(batches):
    return [i for batch in batches for i in batch.sample_ids]


def number(name):
    return int(name[1:])


def flat(batches):
    """Everything of the micro-batches that must be equal, row by row."""
    return [
        (batch.sample_ids, batch.tokens_BS.tolist(), batch.pixel_values_ICHW)
        for batch in batches
        if batch.sample_ids
    ]


def same(left, right):
    return all(
        a[:2] == b[:2] and (torch.equal(a[2], b[2]) if a[2] is not None else b[2] is None)
        for a, b in zip(
            *(sorted(flat(x), key=lambda batch: batch[0]) for x in (left, right)), strict=True
        )
    )


@pytest.mark.parametrize("dp", [2, 4])
def test_data_parallel_ranks_together_see_the_same_batch(dirty, tokenizer, dp):
    with loader(dirty, tokenizer) as alone:
        parts = [loader(dirty, tokenizer, view=View(dp_rank=rank, dp=dp)) for rank in range(dp)]
        for step in (0, 5, 6):
            together = [batch for part in parts for batch in part.step(step)]
            assert same(alone.step(step), together)
        for part in parts:
            part.close()


def test_a_resumed_loader_continues_bit_by_bit(clean, tokenizer):
    with loader(clean, tokenizer) as first, loader(clean, tokenizer) as resumed:
        history = [first.step(step) for step in range(8)]
        assert all(same(history[step], resumed.step(step)) for step in (6, 7, 2))


def test_the_thread_that_decodes_works_on_the_ranks_device(clean, tokenizer, monkeypatch):
    bound = []

    def set_device(_, index):
        bound.append((threading.current_thread().name.partition("_")[0], index))

    monkeypatch.setattr(CpuPlatform, "device", torch.device("cpu", 3))
    monkeypatch.setattr(CpuPlatform, "set_device", set_device)
    with loader(clean, tokenizer) as made:
        made.step(0)
    assert bound == [("asvr-train", 3)]


def test_micro_batches_divide_the_batch(clean, tokenizer):
    with loader(clean, tokenizer, train__micro_batch=2) as made:
        assert [len(batch.sample_ids) for batch in made.step(0)] == [2, 2]
        assert made.steps == 6


def test_bad_records_keep_their_places_and_hold_nothing(dirty, tokenizer):
    with loader(dirty, tokenizer, train__global_batch=NUM) as made:
        seen = ids(made.step(0))
        assert sorted(seen) == sorted(set(made.sample_ids(0)) - {f"r{bad}" for bad in BAD})
        assert made.num_bad([0]) == 4
        report = made.report()
        named = {bad["id"]: bad["reason"].split(":")[0] for bad in made.bad_samples}
    assert named == {
        "r3": "truncated",
        "r9": "cannot be decoded",
        "r10": "too large",
        "r14": "missing file",
    }
    assert report["bad_records"] == report["num_bad_images"] == report["placeholders"] == 4
    reasons = sorted(why.split(":")[0] for why in report["bad_images"].values())
    assert reasons == ["cannot be decoded", "missing file", "too large", "truncated"]


def test_evaluation_meets_every_good_record_once(dirty, tokenizer):
    with loader(dirty, tokenizer, split="eval", train__global_batch=5) as made:
        seen = [i for step in range(made.steps) for i in sorted(ids(made.step(step)), key=number)]
        assert seen == [f"r{n}" for n in range(NUM) if n not in BAD]
        assert made.report()["placeholders"] == 4


LAYOUTS = [(dp, cp, packing) for dp in (1, 2, 4) for cp in (1, 2) for packing in (False, True)]


@pytest.mark.parametrize(("dp", "cp", "packing"), LAYOUTS)
def test_bad_records_count_in_no_denominator(dirty, tokenizer, dp, cp, packing):
    with loader(dirty, tokenizer, split="eval", train__global_batch=1) as made:
        batches = [batch for step in range(NUM) for batch in made.step(step) if batch.sample_ids]
        want = {
            batch.sample_ids[0]: np.array([batch.num_text_targets, batch.num_visual_targets])
            for batch in batches
        }
    assert len(want) == NUM - len(BAD)
    views = [View(dp_rank=i, dp=dp, cp_rank=j) for i in range(dp) for j in range(cp)]
    layout = {"data__packing": packing, "parallel__cp": cp, "train__global_batch": 7}
    ranks = [loader(dirty, tokenizer, view=view, **layout) for view in views]
    for step in range(4):
        found = sum(
            np.array([batch.num_text_targets, batch.num_visual_targets])
            for rank in ranks
            for batch in rank.step(step)
        )
        good = [name for name in ranks[0].sample_ids(step) if name in want]
        assert len(good) == 7 - ranks[0].num_bad([step])
        assert found.tolist() == sum(want[name] for name in good).tolist()
    for rank in ranks:
        rank.close()


def test_too_many_bad_records_stop_the_run_before_it_starts(dirty, tokenizer):
    with pytest.raises(
        DataError, match=r"4 of 24 records, more than data\.max_bad_share=0\.16; repair.*\n.*r3"
    ):
        loader(dirty, tokenizer, data__max_bad_share=0.16)
    loader(dirty, tokenizer, data__max_bad_share=4 / 24).close()


def test_dropped_records_are_not_in_the_order(dirty, tokenizer, tmp_path):
    changes = {"data__on_bad_sample": "drop", "data__cache_dir": str(tmp_path)}
    with pytest.raises(DataError, match=r"there is no index.*on_bad_sample=replace"):
        loader(dirty, tokenizer, **changes)
    settings = config(data__train=[{"path": str(dirty / "train.json")}], **changes)
    build(settings, settings.data.train, tokenizer, device=CPU)
    with loader(dirty, tokenizer, train__global_batch=5, **changes) as made:
        assert made.num_samples == NUM - len(BAD)
        met = [name for step in range(4) for name in made.sample_ids(step)]
        assert sorted(met, key=number) == [f"r{n}" for n in range(NUM) if n not in BAD]
        assert sorted(ids(made.step(0))) == sorted(made.sample_ids(0))
        assert made.num_bad(range(4)) == 0
        assert {bad["id"] for bad in made.bad_samples} == {f"r{n}" for n in BAD}
        assert made.report()["bad_records"] == 4


def test_only_steps_that_are_made_are_counted(dirty, tokenizer):
    with loader(dirty, tokenizer, data__prefetch_batches=0) as made:
        made.prepare()
        for step in range(made.steps):
            made.facts(step)
        assert "placeholders" not in made.report()
        made.step(0)
        assert made.report().get("placeholders", 0) == made.num_bad([0])


def test_official_mode_takes_no_placeholders(dirty, tokenizer):
    with pytest.raises(DataError, match=r"official averages over micro-batches.*drop"):
        loader(dirty, tokenizer, loss__mode="official")


def test_policy_error_names_the_images(dirty, tokenizer):
    with pytest.raises(
        DataError, match=r"(?s)4 images cannot be used.*3\.img \(record r3\): trunc"
    ):
        loader(dirty, tokenizer, data__on_bad_sample="fail")


def test_wrong_image_folder_is_an_error_under_every_policy(tmp_path, tokenizer):
    record = {"id": "r", "image": "gone.png", "conversations": ask("<image>", "red")}
    (tmp_path / "train.json").write_text(json.dumps([record]))
    with pytest.raises(DataError, match=r"no record of .* is left.*right folder"):
        loader(tmp_path, tokenizer)


def test_one_missing_image_is_not_taken_for_all(clean, tokenizer, tmp_path):
    for name in ("train.json", *(f"{n}.img" for n in range(NUM) if n % 4)):
        (tmp_path / name).write_bytes((clean / name).read_bytes())
    (tmp_path / "5.img").unlink()
    with pytest.raises(DataError, match=r"1 images cannot be used \(is data.*right folder\?\)"):
        loader(tmp_path, tokenizer, data__on_bad_sample="fail")


def test_an_image_that_breaks_later_names_step_rank_and_samples(tokenizer, tmp_path):
    folder = corpus(tmp_path, {})
    with loader(folder, tokenizer, train__global_batch=NUM, data__prefetch_batches=0) as made:
        whole = (folder / "5.img").read_bytes()
        (folder / "5.img").write_bytes(b"")
        with pytest.raises(DataError, match=r"step 0, data-parallel rank 0, samples .*r5.*5\.img"):
            made.step(0)
        (folder / "5.img").write_bytes(dict(good_images())["png-64x64.png"])
        with pytest.raises(DataError, match=r"5\.img is not the one that was checked"):
            made.step(0)
        (folder / "5.img").write_bytes(whole)
        assert len(ids(made.step(0))) == NUM


def test_overlong_records_are_replaced_and_counted(clean, tokenizer, tmp_path):
    records = json.loads((clean / "train.json").read_text())
    records[1]["conversations"][1]["value"] = "red " * 300
    for name in ("train.json", *(f"{n}.img" for n in range(NUM) if n % 4)):
        (tmp_path / name).write_bytes((clean / name).read_bytes())
    (tmp_path / "train.json").write_text(json.dumps(records))
    with loader(tmp_path, tokenizer, train__global_batch=NUM) as cutting:
        assert "r1" in ids(cutting.step(0))
        report = cutting.report()
        assert report["cut_tokens"] == 1
        assert report["cut_tokens_total"] > 40
    with loader(tmp_path, tokenizer, train__global_batch=NUM, data__on_overlong="drop") as dropping:
        assert set(dropping.sample_ids(0)) - set(ids(dropping.step(0))) == {"r1"}
        report = dropping.report()
        assert (report["dropped_samples"], report["placeholders"]) == (1, 1)
    with (
        loader(tmp_path, tokenizer, data__max_length=2) as hopeless,
        pytest.raises(DataError, match=r"none of \d+ fits into data.max_length=2; raise it"),
    ):
        hopeless.step(0)


def test_samples_are_counted_apart_though_their_ids_are_equal(clean, tokenizer, tmp_path):
    shutil.copytree(clean, tmp_path, dirs_exist_ok=True)
    records = json.loads((clean / "train.json").read_text())
    for number in (1, 5):
        records[number]["id"] = "twice"
        records[number]["conversations"][1]["value"] = "red " * 300
    (tmp_path / "train.json").write_text(json.dumps(records))
    with loader(tmp_path, tokenizer, train__global_batch=NUM) as cutting:
        cutting.step(0)
        assert cutting.report()["cut_tokens"] == 2
    with loader(tmp_path, tokenizer, train__global_batch=NUM, data__on_overlong="drop") as dropping:
        dropping.step(0)
        assert (dropping.report()["dropped_samples"], dropping.report()["placeholders"]) == (2, 2)


def test_a_source_without_a_good_image_is_named(clean, tokenizer, tmp_path):
    records = [{"id": "lost", "image": "gone.png", "conversations": ask("<image>?", "red")}]
    (tmp_path / "other.json").write_text(json.dumps(records))
    paths = (clean / "train.json", tmp_path / "other.json")
    settings = config(
        data__train=[{"path": str(p)} for p in paths],
        data__cache_dir=str(tmp_path / "cache"),
        train__global_batch=NUM + 1,
    )
    with (
        Loader(settings, tokenizer, split="train", device=CPU) as made,
        pytest.raises(DataError, match=r"no record of .*other\.json is left.*right folder"),
    ):
        made.prepare()


def test_image_keys_and_codes(clean, tokenizer, tmp_path):
    with loader(clean, tokenizer) as made:
        keys = made.image_keys()
        assert len(keys) == len(set(keys)) == NUM - NUM // 4
        assert torch.equal(made.pixels([2, 0]), made.pixels_of([keys[2], keys[0]]))
    cache = CodeCache(tmp_path, {"name": "c"}, num_patches=4, codebook_sizes=(99, 99))
    table = np.random.default_rng(0).integers(0, 99, (len(keys), 4, 2))
    cache.write(keys, table)
    with loader(clean, tokenizer, codes=cache) as made:
        for batch in made.step(0):
            shown = [i for i in batch.sample_ids if int(i[1:]) % 4]
            assert batch.codes_PD.shape == (4 * len(shown), 2)
            for place, sample in enumerate(shown):
                number = int(sample[1:])
                index = number - 1 - number // 4
                assert batch.codes_PD[4 * place : 4 * place + 4].tolist() == table[index].tolist()
    empty = CodeCache(tmp_path, {"name": "d"}, num_patches=4, codebook_sizes=(99, 99))
    with (
        loader(clean, tokenizer, codes=empty) as made,
        pytest.raises(DataError, match="no codes for the image"),
    ):
        made.step(0)


def test_blank_images_keep_order_and_text_but_show_nothing(dirty, tokenizer):
    with (
        loader(dirty, tokenizer) as seeing,
        loader(dirty, tokenizer, data__blank_images=True) as blind,
    ):
        for a, b in zip(seeing.step(1), blind.step(1), strict=True):
            assert a.sample_ids == b.sample_ids
            assert torch.equal(a.tokens_BS, b.tokens_BS)
            if b.pixel_values_ICHW is not None:
                assert b.pixel_values_ICHW.unique().numel() == 1
        assert len(blind.image_keys()) == 1


def test_prefetch_stays_within_its_window_and_close_stops_it(clean, tokenizer):
    made = loader(clean, tokenizer, data__prefetch_batches=2)
    made.step(0)
    assert sorted(made._ahead) == [1, 2]
    made.step(7)
    assert sorted(made._ahead) == [8, 9]
    made.step(9)  # the last of the run: nothing more is built, nor counted
    assert not made._ahead
    ended = loader(clean, tokenizer, split="eval", data__prefetch_batches=2)
    ended.step(ended.steps - 1)
    assert not ended._ahead
    for each in (made, ended):
        each.close()
        assert not any(thread.is_alive() for thread in each._worker._threads)


def test_an_epoch_later_nothing_is_decoded_or_tokenised_again(clean, tokenizer, monkeypatch):
    seen = []
    for owner, name in ((PixelStore, "_read"), (SampleBuilder, "build")):
        sound = getattr(owner, name)

        def counted(self, *args, sound=sound, name=name):
            seen.append(name)
            return sound(self, *args)

        monkeypatch.setattr(owner, name, counted)
    options = {"train__global_batch": 8, "train__micro_batch": 8, "data__prefetch_batches": 0}
    with loader(clean, tokenizer, **options) as made:
        for step in range(made.steps):
            made.step(step)
        assert set(seen) == {"_read", "build"}
        seen.clear()
        for step in range(made.steps, 6 * made.steps):
            made.step(step)
        assert seen == []
