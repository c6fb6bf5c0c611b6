"""A rank that is slow at every step is named with its host, in the log and in the metrics."""

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch.distributed as dist

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.config.schema import Config
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.train import loop, step
from megatron_asvr.train.pace import LEAST
from tests.run_data import make_files, run_config

pytestmark = pytest.mark.world

DELAY_S = 0.5  # far more than such a step takes


def train_slowly(config: Config) -> Any:
    """Train; the backward passes of rank 1 take longer."""
    backward = step.backward

    def slow(*args: Any) -> Any:
        time.sleep(DELAY_S)
        return backward(*args)

    if dist.get_rank() == 1:
        step.backward = slow
    return loop.train(config)


def test_a_slow_rank_is_named_with_its_host() -> None:
    with tempfile.TemporaryDirectory(prefix="asvr-pace-") as scratch:
        files = make_files(Path(scratch) / "files")
        steps = {"train__steps": LEAST, "train__save_every_steps": LEAST, "data__eval": []}
        config = run_config(files, Path(scratch) / "run", train__watchdog__slow_share=1.0, **steps)
        folder = RunFolder(config.run.dir)
        logs = folder.next_attempt()
        run_ranks(train_slowly, (config,), 2, log_dir=logs, timeout_s=240)
        lines = [json.loads(line) for line in folder.metrics.open()]
        (slow,) = [line for line in lines if line["kind"] == "slow"]
        assert (slow["step"], slow["rank"], slow["host"]) == (LEAST, 1, os.uname().nodename)
        assert slow["own_s"] > DELAY_S
        assert f"rank 1 on {os.uname().nodename}" in (logs / "rank_0.log").read_text()
