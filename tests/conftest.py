"""Skips with a reason, which ``ASVR_REQUIRE=gpu,slurm`` turns into failures."""

import importlib.util
import os
import pathlib
import shutil
from collections.abc import Iterator

from megatron_asvr.platforms import kernels, select

import pytest

# Sources that tests only read: of the other megatron-core, of the Transformer Engine of setup.py.
ROOT = pathlib.Path(__file__).resolve().parents[1]
MCORE19, TE_SOURCES = ROOT / ".venv-mcore19", ROOT / ".venv-te-sources"


def _missing(need: str) -> str | None:
    """Why tests marked ``need`` cannot run here, or None when they can."""
    if need == "gpu" and select()[0].name != "cuda":
        return f"needs a GPU: {select()[1]}"
    for program in ("sbatch", "shellcheck") if need == "slurm" else ():
        if shutil.which(program) is None:
            return f"needs Slurm and shellcheck: no {program} on PATH"
    if need == "eval" and importlib.util.find_spec("lmms_eval") is None:
        return "needs lmms-eval: run by `make test-eval`"
    if need == "te" and importlib.util.find_spec("transformer_engine_torch") is None:
        return "needs Transformer Engine's compiled extension: run by `make test-te`"
    if need == "apis" and not (MCORE19.is_dir() and TE_SOURCES.is_dir()):
        return "needs the sources of the pinned versions: run by `make test-apis`"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here, or fail where the environment says that it must."""
    required = {need.strip() for need in os.environ.get("ASVR_REQUIRE", "").split(",")}
    for need in ("gpu", "slurm", "eval", "apis", "te"):
        reason = _missing(need) if item.get_closest_marker(need) else None
        if reason and need in required:
            pytest.fail(f"{reason}, but ASVR_REQUIRE names {need}", pytrace=False)
        if reason:
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def _kernels_as_the_test_says() -> Iterator[None]:
    """Without kernels until a test builds a run, whatever the test before it did."""
    with kernels.imagined(False):
        yield
