"""Runs that are killed or stopped, and end with the bits of an undisturbed run."""

import functools
import itertools
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_asvr.checkpoint import save, write
from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.meta import read_meta
from megatron_asvr.checkpoint.reader import read_run
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import LaunchError
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.train import loop
from megatron_asvr.train.loop import train
from tests.run_data import all_lines, make_files, repeatable_lines, run_config

pytestmark = pytest.mark.world

SETTINGS: dict[str, Any] = {
    "parallel__tp": 2,
    "train__steps": 8,
    "train__save_every_steps": 3,
    "train__log_every_steps": 2,
    "train__eval_every_steps": 4,
    "train__cosine_every_steps": 3,
}


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="asvr-resume-")  # removed when this process ends


@functools.cache
def files() -> Path:
    return make_files(Path(scratch().name) / "files")


def new_run(name: str, **changes: Any) -> Config:
    settings = {k: v for k, v in SETTINGS.items() if k.partition("__")[0] not in changes}
    return run_config(files(), files().parent / name, **{**settings, **changes})


def weights(config: Config) -> dict[str, Tensor]:
    folder = RunFolder(config.run.dir)
    _, get = read_run(folder.root)
    names = read_meta(folder.step(folder.latest())).trained
    return {name: get(name) for name in names}


def metrics(config: Config) -> list[dict[str, Any]]:
    return repeatable_lines(config)


@functools.cache
def undisturbed(world: int) -> Config:
    config = new_run(f"undisturbed_{world}")
    assert run_ranks(train, (config,), world, timeout_s=240)["finished"]
    return config


def same_as_undisturbed(config: Config, world: int) -> None:
    same(config, undisturbed(world))


def same(config: Config, other: Config) -> None:
    wanted, got = weights(other), weights(config)
    assert wanted.keys() == got.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], got[name])] == []
    assert metrics(config) == metrics(other)


def train_disturbed(config: Config, rank: int, when: str, number: int) -> dict[str, Any]:
    """Train; one rank sends itself a signal inside its fifth step, or inside its second save."""
    send = functools.partial(os.kill, os.getpid(), number)
    if dist.get_rank() == rank and when == "step":
        loop.train_step = before_call(5, send, loop.train_step)
    elif dist.get_rank() == rank:
        file = write.HashingFile

        def begin() -> None:  # what was opened is left with nothing, or with a part of it
            file.write = before_call(2, send, file.write)

        save.write = before_call(2, begin, save.write)
    return train(config)


def before_call(count: int, action: Callable[[], None], fn: Callable[..., Any]) -> Any:
    """``fn``, with something done before one of its calls, counted from 1."""
    calls = itertools.count(1)

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            action()
        return fn(*args, **kwargs)

    return called


def wait_until_nothing_uses(folder: str) -> None:
    """Fail when a process that a killed rank left behind still holds files of the run."""
    deadline = time.monotonic() + 300
    while users := [str(p) for p in Path("/proc").glob("[0-9]*/fd/*") if target(p, folder)]:
        assert time.monotonic() < deadline, users
        time.sleep(0.1)


def target(link: Path, folder: str) -> bool:
    try:
        return str(link.readlink()).startswith(folder)
    except OSError:
        return False


@pytest.mark.parametrize(("rank", "when"), [(1, "step"), (0, "save"), (1, "save")])
def test_killed_at_any_point_it_ends_with_the_same_bits(rank: int, when: str) -> None:
    config = new_run(f"killed_{rank}_{when}")
    with pytest.raises(LaunchError, match="SIGKILL"):
        run_ranks(train_disturbed, (config, rank, when, signal.SIGKILL), 2, timeout_s=240)
    assert RunFolder(config.run.dir).latest() == 3
    wait_until_nothing_uses(config.run.dir)
    result = run_ranks(train, (config,), 2, timeout_s=240)
    assert result["finished"]
    assert [p.name for p in RunFolder(config.run.dir).checkpoints.glob(".*")] == []
    same_as_undisturbed(config, 2)


@pytest.mark.parametrize("world", [2, 4])
def test_told_to_stop_it_saves_and_goes_on_later(world: int) -> None:
    config = new_run(f"stopped_{world}")
    first = run_ranks(
        train_disturbed, (config, world - 1, "step", signal.SIGTERM), world, timeout_s=240
    )
    assert not first["finished"]
    assert 4 < first["step"] < 8
    assert RunFolder(config.run.dir).latest() == first["step"]
    assert run_ranks(train, (config,), world, timeout_s=240)["finished"]
    same_as_undisturbed(config, world)


def test_a_bf16_run_goes_on_with_the_same_bits() -> None:
    whole, config = (new_run(f"bf16_{name}", train__precision="bf16") for name in ("whole", "cut"))
    assert run_ranks(train, (whole,), 2, timeout_s=240)["finished"]
    first = run_ranks(train_disturbed, (config, 0, "step", signal.SIGTERM), 2, timeout_s=240)
    assert not first["finished"]
    assert run_ranks(train, (config,), 2, timeout_s=240)["finished"]
    assert {x.dtype for x in weights(whole).values()} == {torch.bfloat16}
    same(config, whole)
    losses = [line["loss"] for line in metrics(whole) if line["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_another_run_is_refused_and_another_layout_is_not() -> None:
    config = new_run("layout")
    first = run_ranks(train_disturbed, (config, 0, "step", signal.SIGTERM), 2, timeout_s=240)
    assert not first["finished"]
    for changes, message in (
        ({"run__seed": 4}, "run.seed: checkpoint has 3, this run has 4"),
        ({"train__threads_per_rank": 2}, "train.threads_per_rank: checkpoint has 1"),
        ({"model__language__num_layers": 3}, "model.language.num_layers: checkpoint has 2"),
    ):
        with pytest.raises(LaunchError, match=message):
            run_ranks(train, (new_run("layout", **changes),), 2, timeout_s=240)
        assert RunFolder(config.run.dir).last_start() == 0  # a start at work would go on
    one_rank = new_run("layout", parallel__tp=1)
    result = run_ranks(train, (one_rank,), 1, timeout_s=240)
    assert result["finished"]
    want = metrics(undisturbed(2))[-1]
    got = metrics(one_rank)[-1]
    assert got["kind"] == want["kind"] == "eval"
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-6)  # measured 1e-7
    assert not all(
        torch.equal(x, y)
        for x, y in zip(weights(one_rank).values(), weights(undisturbed(2)).values(), strict=True)
    )


LAYOUTS: dict[str, dict[str, Any]] = {
    "cp2": {"parallel": {"cp": 2}},
    "pp2_vpp2": {"parallel": {"pp": 2, "vpp": 2, "stages": [0, 1, 1, 0]}},
    "tp2": {"parallel": {"tp": 2}},
}


@pytest.mark.parametrize(
    ("first", "second"), [("pp2_vpp2", "tp2"), ("tp2", "pp2_vpp2"), ("pp2_vpp2", "cp2")]
)
def test_killed_it_goes_on_in_another_layout(first: str, second: str) -> None:
    name = f"{first}_then_{second}"
    killed, config = (new_run(name, **LAYOUTS[layout]) for layout in (first, second))
    with pytest.raises(LaunchError, match="SIGKILL"):
        run_ranks(train_disturbed, (killed, 1, "step", signal.SIGKILL), 2, timeout_s=240)
    assert RunFolder(config.run.dir).latest() == 3
    wait_until_nothing_uses(config.run.dir)
    assert run_ranks(train, (config,), 2, timeout_s=240)["finished"]
    got, want = metrics(config), metrics(undisturbed(2))
    assert [line.keys() for line in got] == [line.keys() for line in want]
    seen: set[str] = set()
    for mine, theirs in zip(got, want, strict=True):
        assert mine.get("data_hash") == theirs.get("data_hash"), mine["step"]
        # Rows are padded to what the layout needs.
        numbers = {k: v for k, v in theirs.items() if not isinstance(v, str) and k != "padding"}
        # Measured: 3e-6 relative, of the gradient cosine.
        assert {k: mine[k] for k in numbers} == pytest.approx(numbers, rel=1e-5), mine["step"]
        losses = {k: v for k, v in numbers.items() if k.endswith("loss")}
        seen |= losses.keys()
        assert {k: mine[k] for k in losses} == pytest.approx(losses, rel=1e-6), mine["step"]
    assert seen == {"loss", "text_loss", "visual_loss"}
    timed = [line for line in all_lines(config) if line["kind"] in ("start", "train")]
    assert [line["elapsed_s"] for line in timed] == sorted(line["elapsed_s"] for line in timed)
    assert all(0 <= line["goodput"] < 1 for line in timed)
    lost = [line["lost_s"] for line in timed]  # what the first start logged at step 4
    again = [line["kind"] for line in timed].index("start", 1)
    assert not any(lost[:again])
    assert set(lost[again:]) == {max(lost)} != {0.0}
