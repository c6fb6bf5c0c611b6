"""One run on 1, 2, 4 and 8 ranks in turn, interrupted at random: the global batches stay its own.

Contents are compared through ``data_hash`` of metrics.jsonl, a hash of all samples so far, in
order; tests/unit/test_data_elastic.py compares every document of such loaders.
"""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch.distributed as dist

from megatron_asvr.batch import MicroBatch
from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.config.schema import Config
from megatron_asvr.data.loader import Loader
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.train.loop import train
from tests.run_data import make_files, run_config

pytestmark = pytest.mark.world

STEPS = 14
SETTINGS = {
    "train__steps": STEPS,
    "train__global_batch": 8,
    "train__micro_batch": 1,
    "train__log_every_steps": 1,
    "train__save_every_steps": STEPS,
    "data__eval": [],
    "data__packing": True,
}


def train_until(config: Config, stop: int) -> dict[str, Any]:
    """Train; the last rank is told to stop while it does step ``stop``."""
    read = Loader.step

    def step(loader: Loader, number: int) -> list[MicroBatch]:
        if number == stop and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(loader, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "step", step)
        return train(config)


def logged(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunFolder(config.run.dir).metrics.open()]


def test_the_global_batches_of_a_run_are_the_same_on_any_ranks(tmp_path: Path) -> None:
    files = make_files(tmp_path / "files")
    whole, cut = (run_config(files, tmp_path / name, **SETTINGS) for name in ("whole", "cut"))
    assert run_ranks(train, (whole,), 1, timeout_s=240)["finished"]
    wanted = [line for line in logged(whole) if line["kind"] == "train"]
    assert len({line["data_hash"] for line in wanted}) == STEPS

    generator = random.Random(5)
    worlds, stops = [1, 2, 4, 8], sorted(generator.sample(range(STEPS - 1), 3))
    generator.shuffle(worlds)
    begun = 0
    for world, stop in zip(worlds, [*stops, None], strict=True):
        fn, args = (train, (cut,)) if stop is None else (train_until, (cut, stop))
        result = run_ranks(fn, args, world, timeout_s=240)
        assert result["continued_from"] == begun
        assert result["finished"] == (stop is None)
        begun = result["step"]
        assert begun == (STEPS if stop is None else stop + 1)
    got = [line for line in logged(cut) if line["kind"] == "train"]
    assert [line["data_hash"] for line in got] == [line["data_hash"] for line in wanted]
    losses = [[line["loss"] for line in lines] for lines in (got, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
