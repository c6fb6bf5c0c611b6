"""`asvr checkpoint` on the checkpoints of a small run."""

import json
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.cli.main import main
from tests.language_cases import one_rank
from tests.run_cases import Bench, config, folder, save

STEPS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a run with four checkpoints, by path."""
    root = tmp_path_factory.mktemp("saved")
    run_folder = folder(root)
    with one_rank() as groups:
        bench = Bench(config(train__trainable=["projector"], train__keep_checkpoints=2), groups)
        for step in STEPS:
            bench.step(step - 1)
            save(bench, run_folder, step)
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


@pytest.fixture
def run(saved: dict[str, bytes], tmp_path: Path) -> RunFolder:
    for name, data in saved.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return RunFolder(tmp_path)


def damage(run: RunFolder, step: int) -> None:
    path = run.step(step) / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    assert main(["checkpoint", *arguments]) == status
    text = capsys.readouterr().out
    return json.loads(text) if "--json" in arguments else text


def test_ls_and_show(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (run.step(3) / "common.pt").write_bytes(b"short")
    run.set_aside(2, attempt=5)
    rows = said(capsys, "ls", str(run.root), "--json")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["problem"] is rows[3]["problem"] is None
    assert rows[1]["problem"] == "set aside as damaged_step_2_attempt_5"
    assert "common.pt is damaged: it has 5 bytes" in rows[2]["problem"]
    assert rows[0]["bytes"] == sum(p.stat().st_size for p in run.step(1).iterdir())
    assert "step        4" in said(capsys, "ls", str(run.root))
    facts = said(capsys, "show", str(run.root), "--json")
    assert (facts["step"], facts["layout"]["tp"]) == (4, 1)
    sizes = 32 * 16 + 32 + 32 * 32 + 32
    assert facts["trained parameters"] == {"projector": sizes}
    assert f"projector: {sizes}" in said(capsys, "show", str(run.step(1)))


def test_verify_reads_every_byte(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert "files are as written" in said(capsys, "verify", str(run.root))
    damage(run, 3)
    assert said(capsys, "verify", str(run.step(4)), "--json")[0]["problems"] == []
    reports = said(capsys, "verify", str(run.root), "--all", "--json", status=1)
    assert [bool(report["problems"]) for report in reports] == [False, False, True, False]
    assert reports[2]["problems"] == ["__0_0.distcp is damaged: its checksum does not fit"]
    frozen = sorted(run.frozen.iterdir())[0]
    frozen.write_bytes(frozen.read_bytes()[:-1] + b"?")
    assert f"frozen/{frozen.name} is damaged" in said(capsys, "verify", str(run.root), status=1)


def test_diff(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    one, four = str(run.step(1)), str(run.root)
    assert said(capsys, "diff", four, str(run.step(4))).endswith("are equal, 0 are not\n")
    report = said(capsys, "diff", one, four, "--json", status=1)
    assert report["settings"] == {}
    names = {f"projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert report["weights"].keys() == names
    assert all(what.startswith("largest difference") for what in report["weights"].values())
    assert report["equal"] > 20


def test_prune_never_deletes_the_newest_that_verifies(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(run.root)
    report = said(capsys, "prune", root, "--dry-run", "--json")
    assert report["deleted"] == [str(run.step(1)), str(run.step(2))]  # as the run is set
    damage(run, 4)
    damage(run, 3)
    report = said(capsys, "prune", root, "--keep", "1", "--dry-run", "--json")
    assert report["newest_verified"] == 2
    assert report["deleted"] == [str(run.step(1)), str(run.step(3))]
    assert run.steps() == [1, 2, 3, 4]
    run.set_aside(3, attempt=0)
    assert "step 2" in said(capsys, "prune", root, "--keep", "1")
    assert (run.steps(), run.damaged()) == ([2, 4], [])
    damage(run, 2)
    assert main(["checkpoint", "prune", root]) == 1
    assert "no checkpoint of" in capsys.readouterr().err
    assert run.steps() == [2, 4]


def test_prune_keeps_multiples(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    report = said(capsys, "prune", str(run.root), "--keep", "1", "--keep-every", "2", "--json")
    assert not report["dry_run"]
    assert run.steps() == [2, 4]


def test_a_folder_without_checkpoints_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for action in ("ls", "show", "verify", "prune"):
        assert main(["checkpoint", action, str(tmp_path)]) == 1
        assert "CheckpointError" in capsys.readouterr().err
