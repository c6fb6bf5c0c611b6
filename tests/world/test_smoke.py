"""`asvr gpu-smoke` where there is no GPU, and its collective between two processes."""

import json

from megatron_asvr.platforms.cpu import CpuPlatform

import pytest

from megatron_asvr.cli.main import main
from megatron_asvr.launch import probes_of_runs, smoke
from megatron_asvr.launch.smoke import PROBES
from tests.run_data import make_files, run_config

pytestmark = pytest.mark.world


def test_without_a_gpu_nothing_of_one_passes(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["gpu-smoke", "--bundle", "bundle.json"]) == 0
    bundle = json.loads((tmp_path / "bundle.json").read_text())
    states = {result["probe"]: result["state"] for result in bundle["results"]}
    of_host = {name for name, probe in PROBES.items() if probe.level == "host"}
    assert states == {name: "PASS" if name in of_host else "NOT RUN" for name in PROBES}
    assert all(result["action"] for result in bundle["results"] if result["state"] != "PASS")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{len(of_host)} PASS, 0 FAIL, {len(PROBES) - len(of_host)} NOT RUN"
    assert len(lines) == len(PROBES) + 1


def test_a_machine_that_must_have_a_gpu_and_shows_none_is_an_error(monkeypatch, capsys) -> None:
    monkeypatch.setattr(smoke, "call", lambda *_, **__: {"state": "PASS", "measured": "fine"})
    assert main(["gpu-smoke", "--require", "gpu"]) == 1
    told = capsys.readouterr()
    assert "PASS" in told.out
    assert "--require gpu: nothing that needs a GPU ran (" in told.err
    monkeypatch.setattr(CpuPlatform, "num_gpus", 1)
    assert main(["gpu-smoke", "--require", "gpu"]) == 0


def test_a_failed_probe_is_the_commands_error(monkeypatch, capsys) -> None:
    """The rest is told all the same."""
    monkeypatch.setattr(smoke, "call", lambda *_, **__: {"state": "FAIL", "measured": "2 MiB/s"})
    assert main(["gpu-smoke"]) == 1
    told = capsys.readouterr()
    assert "FAIL     async save, write_speed: 2 MiB/s" in told.out
    assert "next: look at the storage" in told.out
    assert f"1 FAIL, {len(PROBES) - 1} NOT RUN" in told.out
    assert "these probes failed: write_speed" in told.err


def test_a_run_that_is_not_there_is_told_before_the_first_probe(capsys) -> None:
    assert main(["gpu-smoke", "nowhere.yaml"]) == 1
    told = capsys.readouterr()
    assert not told.out
    assert "nowhere.yaml" in told.err


def test_ranks_of_one_node_are_refused(monkeypatch, capsys) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert main(["gpu-smoke"]) == 1
    assert "torchrun started 2 ranks; start `asvr gpu-smoke` once" in capsys.readouterr().err


def test_two_ranks_measure_what_they_send(monkeypatch) -> None:
    found = probes_of_runs.all_reduce()
    assert found.ok
    assert found.measured.endswith("GB/s of 2 ranks")
    monkeypatch.setattr(CpuPlatform, "link_gb_s", lambda self: 1e6)
    found = probes_of_runs.all_reduce()
    assert not found.ok
    assert "40% of 1e+06" in found.expected


def test_a_layout_is_certified(tmp_path) -> None:
    run = run_config(make_files(tmp_path / "files"), tmp_path / "run", data__codes="online")
    found = probes_of_runs.tensor_certificate(run)
    assert found.ok, found
    assert found.measured.startswith("tp=2: ")
