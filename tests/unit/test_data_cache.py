"""Codes come back as written; damaged and foreign parts are noticed."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_asvr.data.cache import CodeCache, FeatureCache, cache_facts, cache_root
from megatron_asvr.data.parts import Part
from megatron_asvr.data.pixels import BLANK_KEY, ZERO_KEY
from megatron_asvr.data.views import stored_key
from megatron_asvr.errors import DataError
from megatron_asvr.model.vision import SiglipEncoder
from megatron_asvr.train.caches import _missing
from tests.unit.data_corpus import config

SIZES = (64, 16, 300)
KEYS = [BLANK_KEY, ZERO_KEY, "ab" * 32]
FACTS = {"tokenizer": "t1", "encoder dtype": "float32"}


def cache(root, sizes=SIZES, facts=FACTS):
    return CodeCache(root, facts, num_patches=5, codebook_sizes=sizes)


def codes(seed=0, images=3, sizes=SIZES):
    return np.random.default_rng(seed).integers(0, sizes, (images, 5, len(sizes)))


def only_part(folder):
    (part,) = folder.glob("*.codes")
    return part


def test_codes_come_back_in_two_bytes_and_to_other_processes(tmp_path):
    first, other = cache(tmp_path), cache(tmp_path)
    assert first.missing([*KEYS, KEYS[0]]) == KEYS
    first.write(KEYS, codes())
    assert first.missing(KEYS) == other.missing(KEYS) == []
    again = cache(tmp_path)
    assert len(again) == 3
    for place, key in enumerate(KEYS):
        for each in (first, other, again):
            np.testing.assert_array_equal(each.get(key), codes()[place])
    assert again.get(KEYS[0]).dtype == np.uint16
    assert only_part(again.folder).stat().st_size == 256 + 3 * (32 + 4 + 5 * len(SIZES) * 2)


def test_an_image_of_the_paper_takes_11_7_kb(tmp_path):
    paper = CodeCache(tmp_path, FACTS, num_patches=729, codebook_sizes=[16384] * 8)
    keys = [f"{number:064x}" for number in range(40)]
    paper.write(keys, np.zeros((40, 729, 8), np.int64))
    paper.write_index()
    size = sum(file.stat().st_size for file in paper.folder.iterdir()) / 40
    assert 729 * 8 * 2 == 11_664
    assert 11_664 + 36 < size < 11_800


def test_large_codebooks_take_four_bytes(tmp_path):
    sizes = (65537, 65536)
    large = cache(tmp_path, sizes)
    value = np.full((1, 5, 2), (65536, 65535))
    large.write(KEYS[:1], value)
    np.testing.assert_array_equal(cache(tmp_path, sizes).get(KEYS[0]), value[0])
    assert cache(tmp_path / "b", (65536, 2)).dtype == np.uint16


@pytest.mark.parametrize("damage", ["cut", "header", "key", "empty"])
def test_damaged_parts_are_set_aside_counted_and_written_again(tmp_path, damage):
    cache(tmp_path).write(KEYS[:2], codes(images=2))
    part = only_part(cache(tmp_path).folder)
    cache(tmp_path).write(KEYS[2:], codes(1, images=1))
    data = bytearray(part.read_bytes())
    data[260 if damage == "key" else 3] ^= 1
    part.write_bytes(data[: {"cut": len(data) - 10, "empty": 0}.get(damage, len(data))])
    found = cache(tmp_path)
    assert list(found.damaged) == [part.name]
    assert found.missing(KEYS) == KEYS[:2]
    found.write(KEYS[:2], codes(images=2))
    assert found.missing(KEYS) == []
    np.testing.assert_array_equal(found.get(KEYS[1]), codes(images=2)[1])
    assert cache(tmp_path).damaged == {}
    assert part.with_name(part.name + ".damaged").exists()


def test_a_flipped_bit_is_never_used(tmp_path):
    cache(tmp_path).write(KEYS, codes())
    part = only_part(cache(tmp_path).folder)
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    opened = cache(tmp_path)
    np.testing.assert_array_equal(opened.get(KEYS[0]), codes()[0])
    with pytest.raises(DataError, match="check sum of image 2 differs; the file was set aside"):
        opened.get(KEYS[2])
    assert cache(tmp_path).missing(KEYS) == KEYS
    cache(tmp_path).write(KEYS, codes())
    assert cache(tmp_path).check() == {}
    part.write_bytes(data)
    assert "image 2" in cache(tmp_path).check(0, 2)[part.name]
    assert cache(tmp_path).missing(KEYS) == KEYS


def test_a_part_with_the_rows_of_others_is_damaged(tmp_path):
    """A row's check sum covers its key, so that rows cannot change places."""
    target = cache(tmp_path)
    target.write(KEYS, codes())
    part = only_part(target.folder)
    data = bytearray(part.read_bytes())
    row = 5 * len(SIZES) * 2
    first, last = data[-3 * row : -2 * row], data[-row:]
    data[-3 * row : -2 * row], data[-row:] = last, first
    part.write_bytes(data)
    with pytest.raises(DataError, match="check sum of image 0"):
        cache(tmp_path).get(KEYS[0])


def test_opening_reads_an_index_and_no_part(tmp_path, monkeypatch):
    target = cache(tmp_path)
    keys = [f"{number:064x}" for number in np.random.default_rng(0).permutation(60)]
    for start in range(0, 60, 10):
        target.write(keys[start : start + 10], codes(start, images=10))
    target.write(keys[:7], codes(0, images=10)[:7])  # another job encoded these too
    target.write_index()
    opened = []
    init = Part.__init__
    monkeypatch.setattr(Part, "__init__", lambda *args: (opened.append(args[1]), init(*args))[1])
    again = cache(tmp_path)
    assert len(again) == 60
    assert again.missing([*keys, "ff" * 32]) == ["ff" * 32]
    assert opened == []
    np.testing.assert_array_equal(again.get(keys[33]), codes(30, images=10)[3])
    assert len(opened) == 1
    target.write(["ff" * 32], codes(images=1))
    assert cache(tmp_path).missing(["ff" * 32]) == []  # an index of fewer parts is not used
    target.write_index()
    assert len(list(target.folder.glob("index-*"))) == 1


def test_a_damaged_index_is_deleted(tmp_path):
    target = cache(tmp_path)
    target.write(KEYS, codes())
    target.write_index()
    (index,) = target.folder.glob("index-*")
    data = index.read_bytes()
    raw = bytes.fromhex(KEYS[2])
    assert data.count(raw) == 1
    index.write_bytes(data.replace(raw, raw[:-1] + b"\x00"))
    broken = cache(tmp_path)
    assert broken.missing(KEYS) == [KEYS[2]]  # encoded again at worst
    with pytest.raises(DataError, match=r"index of .* was damaged and is deleted"):
        broken.get("ab" * 31 + "00")
    assert cache(tmp_path).missing(KEYS) == []
    target.write_index()
    index.write_bytes(data[:100])
    assert cache(tmp_path).missing(KEYS) == []


def test_wrong_codes_are_refused(tmp_path):
    target = cache(tmp_path)
    with pytest.raises(DataError, match=r"shape \(3, 5, 2\)"):
        target.write(KEYS, codes()[..., :2])
    with pytest.raises(DataError, match="outside their codebooks"):
        target.write(KEYS, codes() + 60)
    with pytest.raises(DataError, match="asvr tokenizer encode"):
        target.get(KEYS[0])
    assert not target.folder.exists()


def test_another_fingerprint_is_another_cache_and_the_difference_is_told(tmp_path):
    mine, other = cache(tmp_path), cache(tmp_path, facts={**FACTS, "encoder dtype": "bfloat16"})
    mine.write(KEYS, codes())
    assert other.missing(KEYS) == KEYS
    with pytest.raises(DataError, match="encoder dtype 'float32' instead of 'bfloat16'") as error:
        other.get(KEYS[0])
    assert "tokenizer" not in str(error.value).partition("made with")[2]


def test_a_folder_that_is_not_what_its_name_says_is_refused(tmp_path):
    mine = cache(tmp_path)
    mine.write(KEYS, codes())
    manifest = mine.folder / "manifest.json"
    assert json.loads(manifest.read_text()) == FACTS
    manifest.write_text(json.dumps({**FACTS, "tokenizer": "t2"}))
    with pytest.raises(DataError, match="made with tokenizer 't2' instead of 't1'"):
        cache(tmp_path)


TOKENIZER = {"tokenizer": "t1", "encoder dtype": "float32", "attention": "sdpa on cpu"}


@pytest.mark.parametrize(
    ("changes", "tokenizer", "device", "named"),
    [
        ({}, {"tokenizer": "t2"}, "cpu", {"tokenizer"}),
        ({}, {"encoder dtype": "bfloat16"}, "cpu", {"encoder dtype"}),
        ({}, {"attention": "flash on cuda"}, "cpu", {"attention"}),
        ({}, {}, "cuda", {"decoder"}),
        ({"data__image_fit": "pad"}, {}, "cpu", {"data.image_fit"}),
        ({"model__vision__image_size": 24}, {}, "cpu", {"model.vision.image_size"}),
        ({"train__global_batch": 8, "data__max_length": 99}, {}, "cpu", set()),
    ],
)
def test_facts_follow_preprocessing_and_tokenizer(changes, tokenizer, device, named):
    base = cache_facts(config(), TOKENIZER, device="cpu")
    other = cache_facts(config(**changes), {**TOKENIZER, **tokenizer}, device=device)
    assert {"format", "pixels version", "decoder"} < base.keys()
    assert {name for name in base if base[name] != other[name]} == named


def test_views_of_a_picture_have_keys_of_their_own(tmp_path):
    digest = "ab" * 32
    keys = [digest, f"{digest}@1x2.0", f"{digest}@1x2.1", f"{digest}@2x1.0"]
    stored = {stored_key(key) for key in keys}
    assert len(stored) == 4
    assert stored_key(digest) == digest
    assert all(len(bytes.fromhex(key)) == 32 for key in stored)
    first = cache(tmp_path)
    codes_IND = np.arange(2 * 5 * 3).reshape(2, 5, 3) % 7
    first.write(keys[:2], codes_IND)
    assert first.missing(keys) == keys[2:]
    assert (first.get(keys[1]) == codes_IND[1]).all()


def test_default_folder_lies_beside_the_run():
    assert str(cache_root(config(run__dir="runs/a/stage1"))) == "runs/a/codes"
    assert str(cache_root(config(data__cache_dir="/c"))) == "/c"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_come_back_bit_for_bit(tmp_path, dtype):
    features_INF = torch.randn(3, 5, 4).to(dtype)
    features_INF[1, 2, 3] = float("nan")
    form = {"num_patches": 5, "width": 4, "dtype": dtype}
    FeatureCache(tmp_path, FACTS, **form).add(KEYS, features_INF)
    opened = FeatureCache(tmp_path, FACTS, **form)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    got_INF = opened.features([KEYS[2], KEYS[1]])
    assert got_INF.dtype == dtype
    assert torch.equal(got_INF.view(bits), features_INF[[2, 1]].view(bits))
    assert opened.folder.parent == tmp_path / "features"
    assert opened.features([]).shape == (0, 5, 4)
    with pytest.raises(DataError, match=r"feature cache .* has no features .*data.features=online"):
        opened.features(["00" * 32])


def test_what_decides_a_feature_names_its_cache():
    vision = dataclasses.replace(config().model.vision, feature_layer=-2)
    encoder = SiglipEncoder(vision)
    before = encoder.fingerprint()
    with torch.no_grad():
        encoder.post_layernorm.weight += 1
    encoder.leave_out_unused()
    assert encoder.fingerprint() == before
    other = SiglipEncoder(dataclasses.replace(vision, num_heads=8))
    other.leave_out_unused()
    other.load_state_dict(encoder.state_dict())
    assert other.fingerprint() != before
    with torch.no_grad():
        encoder.encoder.layers[1].mlp.fc2.bias[0] += 1e-6
    assert encoder.fingerprint() != before


def test_what_has_no_room_is_refused_before_anything_is_encoded(tmp_path, monkeypatch):
    opened = FeatureCache(tmp_path, FACTS, num_patches=5, width=4, dtype=torch.float32)
    opened.folder.mkdir(parents=True)
    room = SimpleNamespace(free=3 * opened.row_bytes)
    monkeypatch.setattr("shutil.disk_usage", lambda _: room)
    assert _missing([opened], KEYS, True) == {"feature": KEYS}
    room.free -= 1
    with pytest.raises(
        DataError, match=r"feature cache .* lacks 3 images, .*data\.features=online"
    ):
        _missing([opened], KEYS, True)
