"""What `asvr env` thinks of versions that are right, wrong, other than pinned, or not there."""

import json
import subprocess
import sys
from pathlib import Path

from megatron_asvr.platforms import stack

import pytest

from megatron_asvr.cli.main import main
from tests.unit.test_packaging import EXTRAS, REQUIRED

ROW = stack.Row(
    name="NCCL", needed="gpu", supported=">=2.27", pinned="nvidia-nccl-cu13", find=lambda: ("", "")
)


@pytest.mark.parametrize(
    ("found", "needed", "state"),
    [
        (("2.29.7", ""), True, "ok"),
        (("2.30.1", ""), True, "untested"),
        (("2.18.0", ""), True, "WRONG"),
        (("2.18.0", ""), False, "untested"),
        ((None, "torch has none"), True, "WRONG"),
        ((None, "torch has none"), False, "absent"),
    ],
)
def test_states(found, needed, state):
    assert stack.judge(ROW, found, "2.29.7", needed=needed).state == state


def test_a_library_that_tells_less_of_its_version_than_its_package_is_the_same():
    assert stack.judge(ROW, ("9.20.0", ""), "9.20.0.48", needed=True).state == "ok"
    assert stack.judge(ROW, ("9.2", ""), "9.20.0.48", needed=True).state == "untested"


def test_a_machine_without_a_gpu_lacks_things_and_says_so(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert main(["env", "--json"]) == 0
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)}
    assert lines["driver"]["state"] == "absent"
    assert lines["driver"]["found"] is None
    assert lines["torch"]["state"] == "ok"
    assert lines["declared packages"]["state"] == "ok"
    assert lines["C++ kernels"]["state"] == "absent"
    assert "no compiler" in lines["C++ kernels"]["note"]
    assert main(["env", "--gpu"]) == 1
    printed = capsys.readouterr()
    assert "driver" in printed.out
    assert (
        "ConfigError: this machine cannot run everything it has to: driver missing (no nvidia-"
        in (printed.err)
    )


def test_a_driver_that_is_too_old_is_found_where_there_are_gpus(capsys, monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 0, NVIDIA H100, 81559, 4, 0, 0, 535.104.05\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert main(["env"]) == 1
    assert "driver 535.104.05 (supported are >=580" in capsys.readouterr().err


def test_a_package_that_does_not_fit_is_named(tmp_path):
    """Seen as an import would see it: the first on the path."""
    for name, version in (("numpy-0.1", "0.1"), ("pillow-0.2", "0.2")):
        info = tmp_path / f"{name}.dist-info"
        info.mkdir()
        package = name.partition("-")[0]
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
    dali = tmp_path / "nvidia_dali_cuda120-1.50.0.dist-info"
    dali.mkdir()
    (dali / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: nvidia-dali-cuda120\nVersion: 1.50.0\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_asvr", "env"],
        env={"PYTHONPATH": f"{tmp_path}:{root}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "a second build of DALI" in done.stdout
    assert "nvidia-dali-cuda120" in done.stderr


def test_the_pins_agree_with_setup():
    pinned = stack.pins()
    for requirement in (*REQUIRED, *EXTRAS["gpu"]):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement
    assert {r.name for r in EXTRAS["gpu"]} <= set(pinned)
