"""Without any one of the shims, megatron-core fails on the CPU, or fails silently."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

from megatron_asvr.platforms import shims

import pytest

pytestmark = [pytest.mark.world, pytest.mark.slow]

NAMES = ["-", *(shim.name for shim in shims.SHIMS)]


@pytest.fixture(scope="module")
def reports():
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.shim_scenario", *NAMES]
    # A shim of this process may have set the variable; the scenarios must start without it.
    env = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {report["name"]: report for report in lines}


def test_with_all_of_them_it_works(reports):
    assert reports["-"]["error"] == ""


def test_every_redirect_is_taken(reports):
    redirects = {"current_device", "factories", "moves", "streams", "generator", "type_names"}
    assert redirects <= set(reports["-"]["used"])


@pytest.mark.parametrize("name", NAMES[1:])
def test_without_one_it_fails(reports, name):
    if name == "no_triton":
        core = pathlib.Path(importlib.util.find_spec("megatron.core").origin).parent
        if not (core / "transformer/moe/ops/paged_stash.py").exists():
            pytest.skip("this megatron-core does not import triton")
        if importlib.util.find_spec("triton"):
            pytest.skip("triton is installed")
    assert reports[name]["error"] != ""
