"""Steps whose numbers cannot be right: the run ends as if its order never had their batches."""

import functools
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_asvr.batch import MicroBatch
from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.reader import read_run, weight_names
from megatron_asvr.config.schema import Config
from megatron_asvr.data.loader import Loader
from megatron_asvr.data.order import StepOrder
from megatron_asvr.errors import LaunchError
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.train import loop
from tests.run_data import make_files, repeatable_lines, run_config

pytestmark = pytest.mark.world

STEPS, SAVE, BAD = 8, 3, 4  # steps, distance of checkpoints, the batch that goes wrong
SETTINGS: dict[str, Any] = {
    "parallel__tp": 2,
    "train__steps": STEPS,
    "train__save_every_steps": SAVE,
    "data__eval": [],
    "data__prefetch_batches": 0,
}


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="asvr-anomalies-")


@functools.cache
def files() -> Path:
    return make_files(Path(scratch().name) / "files")


def new_run(name: str, **changes: Any) -> Config:
    settings = {f"train__anomaly__{key}": value for key, value in changes.items()}
    return run_config(files(), files().parent / name, **SETTINGS, **settings)


def train_without(config: Config, gaps: tuple[int, ...]) -> Any:
    """Train on an order of batches that some of the seed's are missing from."""
    all_of = StepOrder.indices
    left = [number for number in range(STEPS + len(gaps)) if number not in gaps]
    StepOrder.indices = lambda order, step: all_of(order, left[step])
    return loop.train(config)


def train_with(config: Config, fault: str, stops: bool = False) -> Any:
    """Train; the numbers of one batch go wrong. ``stops``: a signal comes two batches later."""
    now: list[int] = [0]
    load = Loader.step

    def step(loader: Loader, number: int) -> list[MicroBatch]:
        now[0] = number
        if stops and number == BAD + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        batches = load(loader, number)
        return [poisoned(b) for b in batches] if (number, fault) == (BAD, "images") else batches

    Loader.step = step
    make = loop.loss_function

    def loss_function(*args: Any, **kwargs: Any) -> Callable[..., Tensor]:
        loss = make(*args, **kwargs)
        change = {"gradient": infinite_gradient, "spike": lambda x: 100 * x}.get(fault)
        return loss if now[0] != BAD or change is None else lambda sums: change(loss(sums))

    loop.loss_function = loss_function
    return loop.train(config)


def train_to_infinity(config: Config) -> Any:
    """Train; rank 1 has an infinite weight after the step before the first checkpoint."""
    take_step = loop.train_step

    def train_step(chunks: Any, *args: Any, step: int, **kwargs: Any) -> Any:
        result = take_step(chunks, *args, step=step, **kwargs)
        if step == SAVE - 1 and dist.get_rank() == 1:
            weight = next(p for p in chunks[0].parameters() if p.requires_grad)
            weight.data.view(-1)[0] = float("inf")
        return result

    loop.train_step = train_step
    return loop.train(config)


def poisoned(batch: MicroBatch) -> MicroBatch:
    pixels = batch.pixel_values_ICHW
    return batch if pixels is None else replace(batch, pixel_values_ICHW=pixels * float("nan"))


def infinite_gradient(x: Tensor) -> Tensor:
    """``x``, whose gradient is no number."""
    return x + (0 * x).sqrt()


def run(fn: Callable[..., Any], *args: Any) -> Any:
    return run_ranks(fn, args, 2, timeout_s=240)


@functools.cache
def never_had(*gaps: int) -> Config:
    config = new_run(f"without_{'_'.join(map(str, gaps))}")
    assert run(train_without, config, gaps)["finished"]
    return config


def weights(config: Config) -> dict[str, Tensor]:
    _, get = read_run(config.run.dir)
    return {name: get(name) for name in weight_names(RunFolder(config.run.dir).step(STEPS))}


def metrics(config: Config) -> list[dict[str, Any]]:
    return repeatable_lines(config, "skipped_batches")


def same_as_never(config: Config, *gaps: int) -> None:
    got, wanted = weights(config), weights(never_had(*gaps))
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []
    assert metrics(config) == metrics(never_had(*gaps))


def events(config: Config) -> list[dict[str, Any]]:
    return RunFolder(config.run.dir).events()


def test_skipped_it_is_as_if_never_there_also_after_a_stop() -> None:
    config = new_run("skip", on_nonfinite="skip")
    first = run(train_with, config, "images", True)
    assert not first["finished"]
    assert run(train_with, config, "images")["finished"]
    same_as_never(config, BAD)
    (event,) = events(config)
    assert event["batches"] == [BAD]
    assert "the loss is not finite" in event["why"]
    assert len(event["samples"]) == 4


def test_a_spike_is_skipped() -> None:
    config = new_run("spike", on_spike="skip", spike_window=3)
    assert run(train_with, config, "spike")["finished"]
    same_as_never(config, BAD)
    (event,) = events(config)
    assert "is a spike" in event["why"]


def test_rolled_back_it_never_had_what_came_after_the_checkpoint() -> None:
    config = new_run("rollback", on_nonfinite="rollback")
    result = run(train_with, config, "gradient")
    assert result["finished"]
    assert result["continued_from"] == SAVE
    same_as_never(config, *range(SAVE, BAD + 1))
    (event,) = events(config)
    assert "the gradient norm is nan" in event["why"]
    assert event["step"] == BAD


def test_too_many_stop_the_run() -> None:
    config = new_run("many", on_nonfinite="skip", max_events=0)
    with pytest.raises(LaunchError, match=r"max_events=0 are allowed"):
        run(train_with, config, "images")
    assert events(config) == []
    assert RunFolder(config.run.dir).latest() == SAVE


def test_weights_that_are_not_finite_are_not_saved() -> None:
    config = new_run("infinity", on_nonfinite="skip")
    with pytest.raises(LaunchError, match="step 3: some weights are no longer finite"):
        run(train_to_infinity, config)
    assert RunFolder(config.run.dir).latest() is None
