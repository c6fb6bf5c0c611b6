"""Weights of a distributed checkpoint are read part by part, whoever wrote which part how."""

from pathlib import Path

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron)

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_asvr.checkpoint import index, write
from megatron_asvr.checkpoint.meta import Meta, ResumeState, write_meta
from megatron_asvr.checkpoint.reader import read_run
from megatron_asvr.config.load import to_dict
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import CheckpointError
from tests.language_cases import one_rank

GENERATOR = torch.Generator().manual_seed(0)
GRID = torch.randn(12, 10, generator=GENERATOR).bfloat16()  # in 2 x 2 blocks, cut to 11 rows
COLUMNS = torch.randn(6, 4, 3, generator=GENERATOR)  # 2 blocks of its second axis
TURNED = torch.randn(5, 7, generator=GENERATOR).t()  # not row after row on disk
SHAPES = {"grid": [11, 10], "columns": [6, 4, 3], "turned": [7, 5], "scalar": [], "row": [9]}
WHOLE = {
    "grid": GRID[:11],
    "columns": COLUMNS,
    "turned": TURNED,
    "scalar": torch.tensor(2.5),
    "row": torch.arange(9.0),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    step = tmp_path_factory.mktemp("run") / "checkpoints" / "step_1"
    step.mkdir(parents=True)
    state = {name: ShardedTensor.from_rank_offsets(name, WHOLE[name]) for name in list(SHAPES)[2:]}
    for i in range(2):
        block = COLUMNS[:, 2 * i : 2 * i + 2].contiguous()
        state[f"columns{i}"] = ShardedTensor.from_rank_offsets("columns", block, (1, i, 2))
        for j in range(2):
            block = GRID[6 * i : 6 * i + 6, 5 * j : 5 * j + 5].contiguous()
            offsets = (0, i, 2), (1, j, 2)
            state[f"grid{i}{j}"] = ShardedTensor.from_rank_offsets("grid", block, *offsets)
    with one_rank():
        share = write.plan(state, step, copy=False)
        written = write.write(share)
        write.write_index(share, [written.results])
    meta = Meta(
        resume=ResumeState(step=1),
        config=to_dict(Config()),
        identity={},
        layout={},
        trained=SHAPES,
        frozen={},
        files=written.files,
    )
    write_meta(step, meta)
    return step


@pytest.mark.parametrize("told", [True, False], ids=["in_place", "by_torch"])
def test_every_tensor_is_read_whole_and_in_parts(checkpoint, told, monkeypatch):
    """Also with a torch that does not tell where in a file the numbers lie."""
    if not told:
        monkeypatch.setattr(index, "_first_byte", lambda _: None)
    _, weights = read_run(checkpoint)
    assert weights.stored.keys() == SHAPES.keys()
    for name, wanted in WHOLE.items():
        assert torch.equal(weights(name), wanted), name
        stored = weights.stored[name]
        assert (stored.shape, stored.dtype) == (tuple(wanted.shape), wanted.dtype)
        for start, end in stored.chunks(chunk_bytes=80):
            part = torch.empty(end - start, dtype=stored.dtype)
            stored.fill(part, start)
            assert torch.equal(part, wanted.flatten()[start:end]), name
        assert len(list(stored.chunks(chunk_bytes=80))) > 1 or wanted.numel() < 10
    assert weights("nothing") is None


def test_in_place_means_without_torch(checkpoint):
    tensors = index.open_index(checkpoint)
    places = {
        name: [index._first_byte(chunk.stored.fill.args[0]) for chunk in tensors[name].chunks]
        for name in ("grid", "turned")
    }
    assert None not in places["grid"]
    assert places["turned"] == [None]


def test_a_damaged_file_is_found_before_its_numbers_are_used(checkpoint):
    (file,) = checkpoint.glob("*.distcp")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    good = file.read_bytes()
    file.write_bytes(raw)
    try:
        _, weights = read_run(checkpoint)
        with pytest.raises(CheckpointError, match="its checksum does not fit"):
            weights("row")
        with pytest.raises(CheckpointError, match="its checksum does not fit"):
            weights.checks[0]()
    finally:
        file.write_bytes(good)
