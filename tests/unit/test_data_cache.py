"""Codes come back as written; damaged and foreign parts are noticed."""

import numpy as np
import pytest

from megatron_asvr.data.cache import CodeCache, cache_root, code_fingerprint
from megatron_asvr.data.pixels import BLANK_KEY, ZERO_KEY
from megatron_asvr.errors import DataError
from tests.unit.data_corpus import config

SIZES = (64, 16, 300)
KEYS = [BLANK_KEY, ZERO_KEY, "ab" * 32]


def cache(root, sizes=SIZES, name="f" * 64):
    return CodeCache(root, name, num_patches=5, codebook_sizes=sizes)


def codes(seed=0, images=3, sizes=SIZES):
    return np.random.default_rng(seed).integers(0, sizes, (images, 5, len(sizes)))


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
    (part,) = again.folder.iterdir()
    assert part.stat().st_size == 256 + 3 * (32 + 5 * len(SIZES) * 2)


def test_large_codebooks_take_four_bytes(tmp_path):
    sizes = (65537, 65536)
    large = cache(tmp_path, sizes)
    value = np.full((1, 5, 2), (65536, 65535))
    large.write(KEYS[:1], value)
    np.testing.assert_array_equal(cache(tmp_path, sizes).get(KEYS[0]), value[0])
    assert cache(tmp_path / "b", (65536, 2)).dtype == np.uint16


@pytest.mark.parametrize("damage", ["flipped", "cut", "header", "empty"])
def test_damaged_parts_are_left_out_counted_and_written_again(tmp_path, damage):
    cache(tmp_path).write(KEYS[:2], codes(images=2))
    (part,) = cache(tmp_path).folder.iterdir()
    cache(tmp_path).write(KEYS[2:], codes(1, images=1))
    data = bytearray(part.read_bytes())
    data[-1 if damage == "flipped" else 3] ^= 1
    part.write_bytes(data[: {"cut": len(data) - 10, "empty": 0}.get(damage, len(data))])
    found = cache(tmp_path)
    assert found.damaged == {part.name}
    assert found.missing(KEYS) == KEYS[:2]
    found.write(KEYS[:2], codes(images=2))
    assert found.missing(KEYS) == []
    assert cache(tmp_path).damaged == set()


def test_wrong_codes_are_refused(tmp_path):
    target = cache(tmp_path)
    with pytest.raises(DataError, match=r"shape \(3, 5, 2\)"):
        target.write(KEYS, codes()[..., :2])
    with pytest.raises(DataError, match="outside their codebooks"):
        target.write(KEYS, codes() + 60)
    with pytest.raises(DataError, match="asvr tokenizer encode"):
        target.get(KEYS[0])
    assert not target.folder.exists()


def test_fingerprint_follows_preprocessing_and_tokenizer():
    base = code_fingerprint(config(), "t1")
    assert base == code_fingerprint(config(train__global_batch=8), "t1")
    changed = (
        code_fingerprint(config(), "t2"),
        code_fingerprint(config(data__image_fit="pad"), "t1"),
        code_fingerprint(config(model__vision__image_size=24), "t1"),
    )
    assert len({base, *changed}) == 4


def test_default_folder_lies_beside_the_run():
    assert str(cache_root(config(run__dir="runs/a/stage1"))) == "runs/a/codes"
    assert str(cache_root(config(data__cache_dir="/c"))) == "/c"
