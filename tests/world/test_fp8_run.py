"""A whole run in 8 bits: its guard's records, and a continuation with the same bits."""

import dataclasses
import json
import shutil
from pathlib import Path

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch
import yaml

from benchmarks import fp8
from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.meta import read_meta
from megatron_asvr.checkpoint.reader import read_run
from megatron_asvr.config.load import to_dict
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
    named = dataclasses.replace(config.precision, backend="local")
    config = dataclasses.replace(config, precision=named)
    again = run_ranks(train, (config,), 1, timeout_s=240)
    assert again["continued_from"] == 2
    assert read_meta(folder.step(4)).resume.left_fp8 == left
    _, held = read_run(tmp_path / "run")
    assert all(torch.equal(held(name), x) for name, x in weights.items())


def test_the_benchmark_trains_each_variant_and_writes_its_table(tmp_path: Path) -> None:
    config = run_config(
        make_files(tmp_path / "files"),
        tmp_path / "run",
        train__steps=2,
        precision__fp8__exclude=["visual_head.heads.*"],
    )
    settings, page = tmp_path / "run.yaml", tmp_path / "page.md"
    settings.write_text(yaml.safe_dump(to_dict(config)))
    page.write_text("before\n" + "\nold\n".join(fp8.MARKS) + "\nafter\n")
    command = [str(settings), "--seeds", "1", "--variants", "current", "--write", str(page)]
    fp8.main(command)
    first = page.read_text()
    assert first.startswith("before\n")
    assert first.endswith("\nafter\n")
    assert "old" not in first
    rows = [line.split("|")[1:-1] for line in first.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["fp32", "current"]
    lines = [json.loads(x) for x in RunFolder(tmp_path / "run/current-0").metrics.open()]
    (loss,) = [x["loss"] for x in lines if x["kind"] == "eval"]
    assert float(rows[1][1]) == pytest.approx(loss, abs=1e-4)
    fp8.main(command)  # everything is there already
    assert page.read_text() == first


def test_intervals_are_students() -> None:
    # Mean 2 and deviation 1 of three: 4.303 / sqrt(3).
    assert fp8.interval([1.0, 2.0, 3.0]) == "+2.00 +- 2.48"
    results = {"fp32": [(2.0, 0.5), (4.0, 0.5)], "block": [(2.02, 0.49), (4.04, 0.49)]}
    last = "| block | 3.0300 | 0.4900 | +1.00 +- 0.00 % | -1.00 +- 0.00 |"
    assert fp8.table(results)[-1] == last
