"""The progress line, metrics.jsonl, wandb's offline files and the code usage."""

import dataclasses
import json
import logging
import math
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch

from megatron_asvr import log
from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.errors import CheckpointError
from megatron_asvr.log import Progress, clock
from megatron_asvr.train.loop import due
from megatron_asvr.train.metrics import (
    MetricsLog,
    Window,
    kept_lines,
    last_values,
    progress_line,
)
from megatron_asvr.train.passes import Part
from megatron_asvr.train.signals import StopRequest
from megatron_asvr.train.step import Agreement, StepResult, agree
from megatron_asvr.train.telemetry import CodeUsage, gradient_cosine
from tests.language_cases import one_rank
from tests.run_cases import Bench, config, micro_batch, step_batches

FULL, FIRST, LAST = 1, 2, 4  # kinds of LevelDB chunks
COUNTS = Agreement(text_count=10, visual_count=4, num_tokens=100, digest=7, stop=False)


def result(loss: float, totals: list[float]) -> StepResult:
    vector = torch.tensor(totals, dtype=torch.float64)
    return StepResult(
        totals=vector, loss=loss, grad_norm=2 * loss, own_s=0.0, busy_s=0.0, wait_s=0.0, parts=[]
    )


def filled() -> Window:
    window = Window()
    # text sum, count, correct; visual count; sums and corrects of two depths
    first = result(3.0, [20.0, 10, 5, 4, 8.0, 4.0, 1, 2])
    window.add(first, COUNTS, data_s=0.5, train_s=2.0)
    second = result(1.0, [10.0, 30, 15, 4, 8.0, 8.0, 3, 2])
    window.add(second, COUNTS, data_s=0.0, train_s=2.0)
    return window


def test_a_window_weighs_targets_not_steps_and_survives_a_checkpoint() -> None:
    values = filled().values()
    assert values["loss"] == 2.0
    assert values["text_loss"] == 30 / 40
    assert values["text_accuracy"] == 0.5
    assert values["visual_loss_1"] == 12 / 8
    assert values["visual_loss"] == (16 / 8 + 12 / 8) / 2
    assert values["tokens_per_s"] == 50
    assert values["data_wait"] == 0.125
    stored = json.loads(json.dumps(dataclasses.asdict(filled())))
    assert Window(**stored) == filled()


def test_the_progress_line_has_what_a_person_needs() -> None:
    line = progress_line({**filled().values(), "lr": 1e-3}, step=120, total_steps=2000)
    assert line == (
        "step 120/2000 loss 2.0000 text 0.7500 visual 1.7500 [2.000 1.500] lr 1.00e-03 "
        "gnorm 4.000 tok/s 50 ETA 1:02:40 data 12%"
    )
    text_only = Window()
    text_only.add(result(1.0, [20.0, 10, 5, 0]), COUNTS, data_s=0.0, train_s=1.0)
    assert "visual" not in progress_line({**text_only.values(), "lr": 0.0}, step=1, total_steps=2)
    assert clock(59.6) == "0:01:00"
    deep = Window()
    losses, corrects = [float(d) for d in range(12)], [0.0] * 12
    deep.add(result(1.0, [1.0, 1, 0, 1, *losses, *corrects]), COUNTS, data_s=0.0, train_s=1.0)
    line = progress_line({**deep.values(), "lr": 0.0}, step=1, total_steps=2)
    assert " 9.000 10.000 11.000]" in line  # in the order of the depths


def test_lines_after_the_checkpoint_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "kind": "train", "loss": step / 3}) for step in (2, 4, 6)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "ki')
    path.write_text("".join(kept_lines(path, 4)))
    assert path.read_text() == "\n".join(lines[:2]) + "\n"
    assert last_values(path, "train")["step"] == 4
    assert last_values(path, "eval") == {}
    assert kept_lines(path, 0) == []


def wandb_history(path: Path) -> Iterator[dict[str, float]]:
    """Rows of an offline wandb file: LevelDB's log framing around protobuf records."""
    from wandb.proto import wandb_internal_pb2

    data, offset, record = path.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        room = 32768 - offset % 32768
        if room < 7:
            offset += room
            continue
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        piece = data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        record = piece if kind in (FULL, FIRST) else record + piece
        if kind in (FULL, LAST):
            parsed = wandb_internal_pb2.Record()
            parsed.ParseFromString(record)
            if parsed.WhichOneof("record_type") == "history":
                items = parsed.history.item
                yield {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


def test_wandb_writes_a_complete_offline_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    run = config(run__wandb="offline", run__dir=str(tmp_path))
    with MetricsLog(folder, run, done_steps=0, attempt=0, active=True) as log:
        for step in (1, 2, 3):
            log.write(step, "train", {"loss": 1 / step})
        log.write(3, "eval", {"loss": 0.5})
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = list(wandb_history(path))
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [1.0, 0.5, 1 / 3]
    assert rows[-1]["eval/loss"] == 0.5


def test_all_starts_of_a_run_are_one_run_for_wandb(tmp_path: Path) -> None:
    folder, run = RunFolder(tmp_path), config(run__wandb="offline", run__dir=str(tmp_path))
    for attempt, step in enumerate((2, 4)):  # the second goes on from step 2
        with MetricsLog(folder, run, done_steps=step - 2, attempt=attempt, active=True) as log:
            log.write(step, "train", {"loss": 1 / step})
    number = (tmp_path / "wandb_id").read_text()
    paths = sorted(tmp_path.glob(f"wandb/offline-run-*-{number}*/run-{number}.wandb"))
    assert [[row["_step"] for row in wandb_history(path)] for path in paths] == [[2], [4]]
    # What docs/slurm.md says, without an account; the files of one run are sent one after another.
    words = [sys.executable, "-m", "wandb", "sync", "--dry-run", *(str(p.parent) for p in paths)]
    said = subprocess.run(words, capture_output=True, text=True, check=True)
    assert all(path.parent.name in said.stdout + said.stderr for path in paths)


def test_lines_of_an_older_start_reach_no_file_of_the_run(tmp_path: Path) -> None:
    """Its process may still live, on a node that Slurm has given up."""
    folder, run = RunFolder(tmp_path), config(run__dir=str(tmp_path))

    def start(attempt: int) -> MetricsLog:
        return MetricsLog(folder, run, done_steps=9, attempt=attempt, active=True)

    assert folder.claim_attempt() == 0
    with start(0) as old:
        old.write(1, "train", {"loss": 1.0})
        assert folder.claim_attempt() == 1
        with start(1) as new:
            old.write(2, "train", {"loss": 2.0})
            new.write(2, "train", {"loss": 3.0})
            with pytest.raises(CheckpointError, match=r"attempt 1 of .* has started since"):
                start(0)  # it was slower than the new one
            new.write(3, "train", {"loss": 4.0})
            old.write(3, "train", {"loss": 5.0})
    lines = [json.loads(line) for line in folder.metrics.open()]
    assert [line["loss"] for line in lines] == [1.0, 3.0, 4.0]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricsLog(RunFolder(tmp_path), config(), done_steps=0, attempt=0, active=False) as log:
        log.write(1, "train", {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_code_usage_counts_targets_and_starts_again() -> None:
    codes_MD = torch.tensor([[0, 1, 4], [0, 2, 4], [1, 3, 4], [1, 4, 4]])
    part = Part(totals=torch.zeros(1), loss=torch.zeros(()), codes_MD=codes_MD)
    with one_rank() as groups:
        usage = CodeUsage([8, 5, 5])
        usage.add([part, part])
        values = usage.values(groups=groups)
        assert values["codes_used_0"] == 0.25
        assert values["code_perplexity_0"] == pytest.approx(2.0)
        assert values["code_perplexity_1"] == pytest.approx(4.0)
        assert values["code_perplexity_2"] == pytest.approx(1.0)
        empty = usage.values(groups=groups)
        assert empty["codes_used_0"] == empty["code_perplexity_0"] == 0.0
        assert CodeUsage([]).values(groups=groups) == {}


def test_the_gradient_cosine_is_that_of_the_two_losses_and_leaves_no_trace() -> None:
    run = config()
    with one_rank() as groups:
        bench, quiet = Bench(run, groups), Bench(run, groups)
        batches = step_batches(run, 0, groups)
        agreement = agree(batches, stop=False, groups=groups)
        got = gradient_cosine(bench.wrapped, batches, agreement, groups=groups)

        shared = [
            p
            for n, p in bench.model.named_parameters()
            if n.startswith(("projector.", "language_model.")) and "output_layer" not in n
        ]
        sums = [bench.model(batch) for batch in batches]
        text, visual = (
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)])
            for loss in (sum(s.text_sum for s in sums), sum(s.visual_sum_D.sum() for s in sums))
        )
        wanted = torch.nn.functional.cosine_similarity(text, visual, dim=0)
        assert got == pytest.approx(float(wanted), abs=1e-6)
        text_only = [micro_batch(run, 1, images=(0, 0))]
        agreement = agree(text_only, stop=False, groups=groups)
        assert gradient_cosine(bench.wrapped, text_only, agreement, groups=groups) is None

        bench.step(0)
        quiet.step(0)
        bench.step(1)
        quiet.step(1)
        mine, theirs = bench.weights(), quiet.weights()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_baseline_without_a_visual_loss_has_no_cosine() -> None:
    trained = ["projector", "language_model"]
    run = config(loss__visual_weight=0.0, train__trainable=trained)
    with one_rank() as groups:
        bench = Bench(run, groups)
        batches = step_batches(run, 0, groups)
        agreement = agree(batches, stop=False, groups=groups)
        assert gradient_cosine(bench.wrapped, batches, agreement, groups=groups) is None
        first = bench.step(0)
        assert math.isfinite(first.loss)


def test_a_signal_is_remembered_and_the_handlers_are_restored() -> None:
    with StopRequest() as stop:
        assert stop.reason is None
        for name in ("SIGUSR1", "SIGTERM", "SIGUSR1"):  # of a script and of Slurm, in any order
            os.kill(os.getpid(), signal.Signals[name])
            assert stop.reason == name
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Also where the tests were started in the background, whose processes ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_only_a_second_interrupt_ends_the_process() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_progress_tells_what_is_left(monkeypatch, caplog) -> None:
    seconds = iter([100.0, 101.0, 112.0, 131.0])
    monkeypatch.setattr(log, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    caplog.set_level(logging.INFO, "megatron_asvr")
    progress = Progress("codes", 100, unit="images")
    progress.skip(40)  # by an earlier start, in no time of this one
    progress.add(1)  # after a second: too early for a line
    progress.add(11)
    progress.add(8, "part 2")
    assert [record.getMessage() for record in caplog.records] == [
        "codes: 52 of 100 images, ETA 0:00:48",
        "codes: 60 of 100 images, ETA 0:01:02, part 2",
    ]


def test_due_counts_from_the_first_step_and_zero_is_never() -> None:
    assert [step for step in range(1, 7) if due(step, 3)] == [3, 6]
    assert not any(due(step, 0) for step in range(7))
