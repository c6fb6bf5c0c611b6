"""Weights on disk: what is opened, what is refused, and shards that are filled in place."""

import json
import pickle
import socket
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_asvr.errors import ConversionError
from megatron_asvr.hf.files import check_finite, open_weights
from megatron_asvr.hf.partial import finalize, partial_folder
from megatron_asvr.hf.shards import ShardWriter

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
    "b": torch.arange(5).to(torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
    "c": torch.full((4, 4), 0.5, dtype=torch.float16),
}


def plan(tensors):
    return {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}


def same(path):
    """Whether everything in ``path`` is ``TENSORS``."""
    found = {name: stored.read() for name, stored in open_weights(path).items()}
    assert {n: (s.shape, s.dtype) for n, s in open_weights(path).items()} == plan(TENSORS)
    return all(torch.equal(found[name], x) for name, x in TENSORS.items())


@pytest.mark.parametrize(("size", "shards"), [(10**6, 1), (40, 2), (1, 6)])
def test_shards_are_filled_in_any_order(tmp_path, size, shards):
    writer = ShardWriter(tmp_path, plan(TENSORS), size)
    for name in sorted(TENSORS, reverse=True):
        writer.add(name, TENSORS[name])
    writer.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == shards
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards > 1)
    assert same(tmp_path)
    # and as the library itself reads it, every tensor aligned
    read = {k: v for f in files for k, v in load_file(f).items()}
    assert all(torch.equal(read[name], x) for name, x in TENSORS.items())
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for file in files:
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name != "__metadata__":
                assert (8 + length + entry["data_offsets"][0]) % TENSORS[name].itemsize == 0


def test_a_strided_tensor_is_written_as_it_looks(tmp_path):
    x = torch.arange(6.0).reshape(2, 3).t()
    writer = ShardWriter(tmp_path, {"x": ((3, 2), torch.float32)}, 100)
    writer.add("x", x)
    writer.close()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["x"], x)


def test_every_tensor_is_written_exactly_once_and_as_announced(tmp_path):
    writer = ShardWriter(tmp_path, plan(TENSORS), 100)
    writer.add("a", TENSORS["a"])
    for name, x, message in [
        ("a", TENSORS["a"], "a came twice"),
        ("b", TENSORS["b"].float(), r"b is torch.float32 \[5\]; wanted torch.bfloat16 \[5\]"),
        ("b", TENSORS["b"][1:], r"b is torch.bfloat16 \[4\]"),
        ("z", TENSORS["b"], "wanted no such tensor"),
    ]:
        with pytest.raises(ConversionError, match=message):
            writer.add(name, x)
    with pytest.raises(ConversionError, match="5 missing: scalar, empty"):
        writer.close()


def test_pickles_hold_tensors_and_nothing_else(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert same(tmp_path)
    torch.save({"state_dict": TENSORS}, tmp_path / "one.pt", _use_new_zipfile_serialization=False)
    assert same(tmp_path / "one.pt")
    torch.save({"a": [1, 2]}, tmp_path / "list.pt")
    with pytest.raises(ConversionError, match="no state dictionary"):
        open_weights(tmp_path / "list.pt")


class Bomb:
    """What a pickle can do to those who open it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused(save, tmp_path):
    path, mark = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    held = {"a": torch.zeros(1), "b": Bomb(mark)}
    if save == "torch":
        torch.save(held, path)
    else:
        path.write_bytes(pickle.dumps(held))
    with pytest.raises(ConversionError, match="could run code; it is refused"):
        open_weights(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_pickles_in_shards(ending, tmp_path):
    halves = [dict(list(TENSORS.items())[:3]), dict(list(TENSORS.items())[3:])]
    index = {}
    for i, half in enumerate(halves):
        name = f"part-{i}.{ending}"
        index |= dict.fromkeys(half, name)
        if ending == "bin":
            torch.save(half, tmp_path / name)
        else:
            save_file(half, tmp_path / name)
    stem = "model" if ending == "safetensors" else "pytorch_model"
    (tmp_path / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": index}))
    assert same(tmp_path)
    (tmp_path / f"part-1.{ending}").unlink()
    with pytest.raises(ConversionError, match="does not exist, but the index names it"):
        open_weights(tmp_path)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_link_out_of_the_folder_is_refused(indexed, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": TENSORS["a"]}, tmp_path / "secret.safetensors")
    name = "part.safetensors" if indexed else "model.safetensors"
    (folder / name).symlink_to("../secret.safetensors")
    if indexed:
        index = {"weight_map": {"a": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r"is a link out of its folder, to .*secret"):
        open_weights(folder)
    # A link that stays inside is none.
    (folder / name).unlink()
    save_file({"a": TENSORS["a"]}, folder / "real.safetensors")
    (folder / name).symlink_to("real.safetensors")
    assert open_weights(folder).keys() == {"a"}


def test_the_hubs_cache_links_to_its_own_blobs(tmp_path):
    blobs, folder = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "f00"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    save_file({"a": TENSORS["a"]}, blobs / "0123")
    (folder / "model.safetensors").symlink_to("../../blobs/0123")
    assert open_weights(folder).keys() == {"a"}
    save_file({"a": TENSORS["a"]}, tmp_path / "other.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../../other.safetensors")
    with pytest.raises(ConversionError, match="is a link out of its folder"):
        open_weights(folder)


def test_a_file_that_shrinks_is_noticed(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": TENSORS["a"]}, path)
    found = open_weights(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConversionError, match="became shorter"):
        found["a"].read()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_only_numbers_that_are_not_finite_are_damage(dtype):
    large = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
    assert check_finite("x", large) is large  # although their sum overflows
    check_finite("n", torch.tensor([1, 2]))
    for wrong in (float("nan"), float("inf"), -float("inf")):
        large[77] = wrong
        with pytest.raises(ConversionError, match="x holds NaN or infinite"):
            check_finite("x", large)


def test_a_killed_conversion_is_cleared_away_and_one_at_work_is_not(tmp_path):
    out = tmp_path / "m[1]"  # a name that means something to glob
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, at_work = (
        tmp_path / f".{out.name}.partial-{socket.gethostname()}-{pid}" for pid in (ended.pid, 1)
    )
    for folder in (left, at_work):
        folder.mkdir()
    mine = partial_folder(out)
    assert not left.exists()
    assert at_work.exists()
    (mine / "config.json").write_text("{}")
    assert finalize(mine, out) == out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([at_work.name, out.name])
    with pytest.raises(ConversionError, match="exists already"):
        partial_folder(out)
