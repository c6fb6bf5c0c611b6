"""Weights of a distributed checkpoint are read part by part, whoever wrote which part how."""

import math
from pathlib import Path

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron)

import pytest
import torch
from megatron.core.dist_checkpointing import load_plain_tensors
from torch import Tensor

from megatron_asvr.checkpoint import index, write
from megatron_asvr.checkpoint.index import Shape
from megatron_asvr.checkpoint.meta import Meta, ResumeState, write_meta
from megatron_asvr.checkpoint.reader import read_run
from megatron_asvr.checkpoint.state import Part, boxes
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


def part(key: str, shape: Shape, memory: Tensor, offset: Shape | None = None) -> Part:
    start = offset or (0,) * len(shape)
    return Part(key, tuple(shape), start, memory, is_main=True, is_padded=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    step = tmp_path_factory.mktemp("run") / "checkpoints" / "step_1"
    step.mkdir(parents=True)
    held = [part(name, WHOLE[name].shape, WHOLE[name]) for name in list(SHAPES)[2:]]
    for i in range(2):
        held.append(part("columns", (6, 4, 3), COLUMNS[:, 2 * i : 2 * i + 2], (0, 2 * i, 0)))
        for j in range(2):
            block = GRID[6 * i : 6 * i + 6, 5 * j : 5 * j + 5]
            held.append(part("grid", (12, 10), block, (6 * i, 5 * j)))
    written = write.write(write.plan(held, step, rank=0, copy=False))
    files = write.write_index(step, written.entries, promised=SHAPES)
    meta = Meta(
        resume=ResumeState(step=1),
        config=to_dict(Config()),
        identity={},
        layout={},
        trained=SHAPES,
        frozen={},
        files=written.files | files,
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


def test_megatron_core_reads_it_too(checkpoint):
    with one_rank():
        found = load_plain_tensors(str(checkpoint))
    assert found.keys() == SHAPES.keys()
    assert torch.equal(found["grid"], GRID)
    assert all(torch.equal(found[name], WHOLE[name]) for name in list(SHAPES)[1:])


@pytest.mark.parametrize("size", [(7,), (3, 4), (1, 5), (4, 1), (2, 3, 4), (1, 3, 1, 4)])
def test_a_run_of_numbers_is_a_few_boxes(size):
    whole = torch.arange(math.prod(size)).view(size)
    for start in range(whole.numel() + 1):
        for stop in range(start, whole.numel() + 1):
            found = list(boxes(size, start, stop))
            assert len(found) <= 2 * len(size) - 1
            pieces = [
                whole[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].flatten()
                for box in found
            ]
            assert torch.cat([torch.empty(0), *pieces]).tolist() == list(range(start, stop))


@pytest.mark.parametrize("change", ["missing", "twice", "instead", "promised"])
def test_numbers_that_are_not_written_exactly_once_are_refused(change, tmp_path):
    held = [part("a", (4, 2), torch.zeros(2, 2), (2 * i, 0)) for i in range(2)]
    wrong = {"missing": held[:1], "twice": [*held, held[0]], "instead": [held[0], held[0]]}
    held = wrong.get(change, held)
    written = write.write(write.plan(held, tmp_path, rank=0, copy=False))
    with pytest.raises(CheckpointError, match="each number exactly once"):
        write.write_index(
            tmp_path, written.entries, promised=["a", "b"][: 1 + (change == "promised")]
        )


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
