"""A whole run in 8 bits: its guard's records, and a continuation with the same bits."""

import json
import shutil
from pathlib import Path

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.meta import read_meta
from megatron_asvr.checkpoint.reader import read_run
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.train.loop import train
from tests.run_data import make_files, run_config

pytestmark = pytest.mark.world


def test_what_the_guard_decides_is_kept_and_a_continued_run_has_the_same_bits(
    tmp_path: Path,
) -> None:
    files = make_files(tmp_path / "files")
    config = run_config(
        files,
        tmp_path / "run",
        data__eval=[],
        train__steps=4,
        train__save_every_steps=2,
        train__keep_checkpoints=9,
        precision__fp8__recipe="delayed",
        precision__fp8__emulate=True,
        precision__fp8__history=2,
        precision__fp8__exclude=["visual_head.heads.*"],
        precision__fp8__guard_every_steps=1,
        precision__fp8__guard_min_cosine=0.9985,  # between the linears of this run
    )
    assert run_ranks(train, (config,), 1, timeout_s=240)["finished"]
    folder = RunFolder(tmp_path / "run")
    lines = [json.loads(line) for line in folder.metrics.open()]
    seen = [line for line in lines if line["kind"] == "fp8"]
    assert [line["step"] for line in seen] == [1, 2, 3, 4]
    left = read_meta(folder.step(4)).resume.left_fp8
    moved = {name: x["step"] for x in seen for name in filter(None, x["moved"].split(", "))}
    assert left == moved
    assert 0 < len(left) < sum(name.endswith(".cosine") for name in seen[0])
    early = read_meta(folder.step(2)).resume.left_fp8
    assert early
    assert early.items() <= left.items()

    _, held = read_run(tmp_path / "run")
    weights = {name: held(name) for name in held.stored}
    shutil.rmtree(folder.step(4))
    again = run_ranks(train, (config,), 1, timeout_s=240)
    assert again["continued_from"] == 2
    assert read_meta(folder.step(4)).resume.left_fp8 == left
    _, held = read_run(tmp_path / "run")
    assert all(torch.equal(held(name), x) for name, x in weights.items())
