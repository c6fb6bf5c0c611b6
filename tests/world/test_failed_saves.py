"""Saves that fail on one rank: nothing hangs, nothing is lost, and the run goes on."""

import json
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch
import torch.distributed as dist

from megatron_asvr.checkpoint import save, write
from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.save import Save
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import CheckpointError, LaunchError
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.train import loop, saving
from megatron_asvr.train.loop import train
from tests.world.test_resume import before_call, metrics, new_run, weights

pytestmark = pytest.mark.world


class FullFile(write.HashingFile):
    """A file on a disk that is full: the system refuses every write to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file.close()
        self._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115


def written(under_way: Save) -> bool:
    """That a save has nothing to write any more, after waiting for that."""
    if under_way._thread is not None:
        under_way._thread.join()
    return True


def train_on_full_disk(config: Config, rank: int, failing: set[int], waits: Any) -> Any:
    """Train; on one rank the disk is full at the saves with these numbers.

    What is written in the background is written when the next step has been done.
    """
    saving.FINAL_WAITS_S = waits
    save.Save.is_written = property(written)
    number = 0
    sound = save.write

    def sometimes(share: write.Share) -> write.Written:
        nonlocal number
        number += 1
        write.HashingFile = FullFile if number in failing and dist.get_rank() == rank else file
        return sound(share)

    file, save.write = write.HashingFile, sometimes
    return train(config)


def saves(config: Config) -> list[tuple[int, int]]:
    lines = [json.loads(line) for line in RunFolder(config.run.dir).metrics.open()]
    return [(x["step"], x["failed_in_a_row"]) for x in lines if x["kind"] == "save"]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_does_not_stop_the_run(rank: int, background: bool) -> None:
    config = new_run(
        f"full_{rank}_{background}",
        train__save_every_steps=3,
        train__steps=9,
        train__keep_checkpoints=9,
        train__async_save=background,
    )
    other = new_run("full_never", train__steps=9, train__save_every_steps=9)
    if not RunFolder(other.run.dir).steps():
        run_ranks(train, (other,), 2, timeout_s=240)
    result = run_ranks(train_on_full_disk, (config, rank, {1, 2, 4}, (0.1,)), 2, timeout_s=240)
    assert result["finished"]
    assert result["failed_saves"] == 3
    folder = RunFolder(config.run.dir)
    assert [row for _, row in saves(config)] == [1, 2, 1]
    # Saved at once it fails at 3 and, a step later, 4, so two steps later again; then at the end.
    # In the background it fails at 3, which is known at 4, and at 5, which is known at 6.
    assert [step for step, _ in saves(config)] == ([4, 6, 9] if background else [3, 4, 9])
    assert folder.steps() == [6, 9]
    assert list(folder.checkpoints.glob(".*")) == []
    assert [x for x in metrics(config) if x["kind"] != "save"] == metrics(other)
    wanted, got = weights(other), weights(config)
    assert [name for name in wanted if not torch.equal(wanted[name], got[name])] == []


def test_a_last_save_that_cannot_succeed_is_an_error() -> None:
    config = new_run("full_at_last", train__steps=4, train__save_every_steps=3)
    call = (config, 1, {2, 3, 4}, (0.1, 0.1))
    with pytest.raises(LaunchError, match=r"step_4 was not written: rank 1: OSError: .*No space"):
        run_ranks(train_on_full_disk, call, 2, timeout_s=240)
    assert RunFolder(config.run.dir).steps() == [3]
    assert run_ranks(train, (config,), 2, timeout_s=240)["continued_from"] == 3


def train_until_superseded(config: Config) -> str:
    """What the error says that stops a run when another start of it begins, in its fifth step."""
    if dist.get_rank() == 0:
        claim = RunFolder(config.run.dir).claim_attempt
        loop.train_step = before_call(5, claim, loop.train_step)
    with pytest.raises(CheckpointError) as err:
        train(config)
    return str(err.value)


def test_an_older_start_stops_at_its_next_step() -> None:
    config = new_run("superseded", train__steps=1000, train__save_every_steps=3)
    said = run_ranks(train_until_superseded, (config,), 2, timeout_s=240)
    assert "attempt 1 of" in said
    assert "has started since, so attempt 0 must not go on" in said
    folder = RunFolder(config.run.dir)
    assert folder.latest() == 3
    assert list(folder.checkpoints.glob(".*")) == []


def test_a_run_says_which_checkpoints_it_skipped() -> None:
    config = new_run("skipping", train__keep_checkpoints=9)
    whole = run_ranks(train, (config,), 2, timeout_s=240)
    assert (whole["continued_from"], whole["skipped_checkpoints"]) == (0, {})
    folder = RunFolder(config.run.dir)
    copy = weights(config)
    for step, name in ((8, "common.pt"), (6, "__1_0.distcp")):
        path = folder.step(step) / name
        path.write_bytes(path.read_bytes()[:-1] + b"#")
    frozen = sorted(folder.frozen.iterdir())[0]
    frozen.write_bytes(frozen.read_bytes()[:-1] + b"#")
    result = run_ranks(train, (config,), 2, timeout_s=240)
    assert result["continued_from"] == 3
    assert {
        step: text.split("step_")[1] for step, text in result["skipped_checkpoints"].items()
    } == {
        8: "8/common.pt is damaged: its checksum does not fit",
        6: "6/__1_0.distcp is damaged: its checksum does not fit",
    }
    note = json.loads((folder.attempts / "1" / "resume.json").read_text())
    assert (note["step"], sorted(note["skipped"])) == (3, ["6", "8"])
    assert len(folder.damaged()) == 2
    again = weights(config)
    assert [name for name in copy if not torch.equal(copy[name], again[name])] == []


@pytest.mark.parametrize(
    "name", ["attempts", "checkpoints", "frozen", "config.yaml", "metrics.jsonl"]
)
def test_a_folder_that_cannot_be_written_is_an_error_of_ours(name: str) -> None:
    config = new_run(f"unwritable_{name}", train__trainable=("projector", "visual_head"))
    path = RunFolder(config.run.dir).root / name
    if "." in name:  # a folder where a file belongs, and the other way round
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True)
        path.touch()
    with pytest.raises(LaunchError, match=rf"(CheckpointError|ConfigError): .*{name}.* cannot be"):
        run_ranks(train, (config,), 2, timeout_s=240)
