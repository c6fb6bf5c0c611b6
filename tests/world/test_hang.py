"""Hangs that are planted, each at a place: who is the cause is told, and the run ends."""

import os
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch.distributed as dist

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import LaunchError
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.train import loop
from megatron_asvr.train.watchdog import STATUS
from tests.hangs import HANG_S, STEP, once, skip_a_collective
from tests.run_data import make_files, run_config

pytestmark = pytest.mark.world


@pytest.fixture(scope="module")
def files() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="asvr-hang-") as folder:
        yield make_files(Path(folder) / "files")


def train_hanging(config: Config, how: str) -> Any:
    """Train; rank 1 is the cause of a hang."""
    if dist.get_rank() == 1 and how == "skips":
        skip_a_collective()
    elif dist.get_rank() == 1:
        stop = signal.SIGSTOP
        loop.train_step = once(loop.train_step, lambda _: os.kill(os.getpid(), stop))
    return loop.train(config)


def hang(files: Path, how: str, layout: str) -> tuple[list[str], list[str]]:
    """What is said of a hang that rank 1 is the cause of, and the log of every rank."""
    settings = {f"parallel__{layout}": 2, "train__steps": 8, "train__watchdog__hang_s": HANG_S}
    config = run_config(files, files.parent / f"{how}_{layout}", **settings)
    folder = RunFolder(config.run.dir)
    logs = folder.next_attempt()
    with pytest.raises(LaunchError, match=f"exited with status {STATUS}") as caught:
        run_ranks(train_hanging, (config, how), 2, log_dir=logs, timeout_s=240)
    said = (folder.attempt(0) / "hang" / "verdict.txt").read_text()
    assert said.strip() in str(caught.value)
    return said.splitlines(), [(logs / f"rank_{rank}.log").read_text() for rank in (0, 1)]


def test_who_skips_a_collective_is_named_with_its_line(files) -> None:
    (first, culprit, other), logs = hang(files, "skips", "tp")
    assert f"no progress in step {STEP};" in first
    assert culprit.startswith(f"culprit: rank 1 on {os.uname().nodename} waits in ")
    assert re.search(r"until now followed: .* at megatron_asvr/train/step.py:\d+ in agree", culprit)
    assert re.search(r"^rank 0 .* at megatron_asvr/train/step.py:\d+ in agree for rank 1$", other)
    for log, function in zip(logs, ("agree", "train_step"), strict=True):
        stack = log.partition("Timeout (")[2]
        assert "(most recent call first)" in stack
        assert f" in {function}\n" in stack


def test_who_waits_for_a_message_instead_is_named_with_its_line(files) -> None:
    (_, culprit, other), _ = hang(files, "skips", "pp")
    assert re.search(r"^culprit: rank 1 on .* is at megatron/core/.*p2p_comm.*py:\d+ in", culprit)
    assert re.search(r"^rank 0 .* at megatron_asvr/train/step.py:\d+ in agree for rank 1$", other)


def test_who_says_nothing_is_named(files) -> None:
    (_, culprit, other), _ = hang(files, "stopped", "pp")
    assert re.search(r"^culprit: rank 1 on .* says nothing", culprit)
    assert re.search(r"^rank 0 on .* is at megatron/core/.*p2p_comm.*py:\d+ in", other)
