"""Skips with a reason, which ``ASVR_REQUIRE=gpu,slurm`` turns into failures."""

import importlib.metadata
import os
import shutil

import pytest
import torch


def _missing(need: str) -> str | None:
    """Why tests marked ``need`` cannot run here, or None when they can."""
    if need == "gpu" and not torch.cuda.is_available():
        return "no CUDA device"
    if need == "slurm" and shutil.which("sbatch") is None:
        return "no sbatch on PATH"
    return None


def pytest_report_header() -> str:
    """The versions that this run is about."""
    names = ("torch", "megatron-core", "transformers")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here, unless the environment says that it must."""
    required = {need.strip() for need in os.environ.get("ASVR_REQUIRE", "").split(",") if need}
    for need in ("gpu", "slurm"):
        reason = _missing(need)
        if reason is None or need in required:
            continue
        for item in items:
            if item.get_closest_marker(need):
                item.add_marker(pytest.mark.skip(reason=reason))
