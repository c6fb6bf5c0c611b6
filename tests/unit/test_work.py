"""What a step needs computed, and where a run's time went."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

from megatron_asvr.platforms import mcore  # noqa: F401
from megatron_asvr.platforms.peaks import link_gb_s, peak_flops

import pytest
import torch

from megatron_asvr.checkpoint.meta import ResumeState
from megatron_asvr.parallel.costs import Counts
from megatron_asvr.precision.local import dense_rule
from megatron_asvr.train import metrics
from megatron_asvr.train.metrics import Window
from megatron_asvr.train.step import agree
from megatron_asvr.train.work import Work, num_pairs, useful_rates, with_past
from tests import asvr_cases
from tests.language_cases import one_rank
from tests.run_cases import Bench, config, step_batches, tokenizer


@pytest.mark.parametrize("sliding_window", [None, 3])
@pytest.mark.parametrize("kind", ["images", "no_images"])
def test_pairs_are_those_that_the_attention_mask_lets_through(kind, sliding_window):
    batch = asvr_cases.micro_batch(kind)
    seen_BQS = ~dense_rule(batch, sliding_window=sliding_window)[:, 0]
    wanted = seen_BQS[batch.document_BS >= 0].sum()
    assert num_pairs(batch, sliding_window) == wanted > 0


def filled(run, groups):
    """A window of two steps of 2 s each, and the work of the run."""
    bench, window = Bench(run, groups), Window()
    counting = Work(run, tokenizer(run.model.vision), groups=groups)
    for step in range(2):
        batches = step_batches(run, step, groups)
        agreement = agree(batches, stop=False, groups=groups, work=counting.counts(batches))
        result = dataclasses.replace(bench.step(step), wait_s=0.5)
        window.add(result, agreement, data_s=0.0, train_s=2.0)
    return window, counting


def test_a_line_tells_the_operations_of_each_part_and_what_padding_takes():
    run = config()
    with one_rank() as groups:
        window, counting = filled(run, groups)
        values = counting.values(window)
    # Of a step: rows with 1, 0, 2 and 1 images (4 patches each) and 6 words; 16 places a row.
    patches, lengths = 16, (10, 6, 14, 10)
    counts = Counts(
        images=4,
        patches=patches,
        positions=sum(lengths),
        pairs=sum(n * (n + 1) / 2 for n in lengths),
        labels=window.values()["text_targets"] / 2,
        codes=patches,
    )
    parts = useful_rates(run, tokenizer(run.model.vision)).parts(counts)
    assert parts["tokenizer"] == 0  # the codes come from the cache
    told = {name: flops / 1e12 for name, flops in parts.items() if flops}
    assert {name[6:]: x for name, x in values.items() if name.startswith("tflop_")} == told
    assert values["tflops"] == pytest.approx(sum(told.values()) / 2)
    assert values["padding"] == pytest.approx(1 - 40 / 64)
    assert values["rank_wait"] == pytest.approx(0.25)
    assert 0 < values["mfu"] < 1  # of what a product reached just before


def test_the_share_of_a_known_gpu_is_told(monkeypatch):
    run = config()
    with one_rank() as groups:
        window, counting = filled(run, groups)
        monkeypatch.setattr(counting, "_peak", 1e12)
        values = counting.values(window)
    assert values["mfu"] == values["tflops"]


def test_an_online_tokenizer_is_counted_as_it_is():
    run = config(data__codes="online")
    pixels = tokenizer(run.model.vision, kind="appearance", feature_layer=None)
    semantic = tokenizer(run.model.vision)
    costs = [useful_rates(run, made).tokenizer for made in (pixels, semantic)]
    assert 0 < costs[0] < costs[1]
    assert useful_rates(run, None).code == 0


def test_peaks_are_found_by_product_name():
    assert peak_flops("NVIDIA H100 PCIe", torch.bfloat16) == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    assert peak_flops("NVIDIA GeForce GTX 1080", torch.bfloat16) is None
    assert link_gb_s("NVIDIA H100 80GB HBM3") == 450
    assert link_gb_s("NVIDIA H100 PCIe") is None


def test_what_came_after_a_checkpoint_is_lost_however_often_it_is_gone_back_to(tmp_path: Path):
    path, saved = tmp_path / "metrics.jsonl", ResumeState(step=4, elapsed_s=100.0, lost_s=5.0)
    assert with_past(ResumeState(), path) == ResumeState()

    def start(done: ResumeState, *later_s: float) -> None:
        lines = [{"step": 4, "kind": "start", "elapsed_s": done.elapsed_s}]
        lines += [{"step": 6, "kind": "train", "elapsed_s": x} for x in later_s]
        lines.append({"step": 6, "kind": "eval"})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    start(saved, 120.0, 150.0)
    second = with_past(saved, path)
    assert (second.elapsed_s, second.lost_s) == (150.0, 55.0)
    start(second)  # ends before it has logged anything
    assert with_past(saved, path) == second
    start(second, 160.0)
    third = with_past(saved, path)
    assert (third.elapsed_s, third.lost_s) == (160.0, 65.0)


def test_pauses_add_up(monkeypatch):
    seconds = iter([1.0, 3.0, 10.0, 14.5])
    window = Window()
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    for _ in range(2):
        with window.pause("eval"):
            pass
    assert window.pauses == {"eval": 6.5}
