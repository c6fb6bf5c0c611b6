"""Transformer Engine's layers against the local ones on one GPU, in bf16 and in 8 bits.

Nobody has run these yet; docs/gpu.md says so until somebody does. No bound here is measured.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import yaml

from megatron_asvr.config.load import to_dict
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.parallel.groups import initialize
from megatron_asvr.parallel.plan import make_plan
from tests import run_cases
from tests.run_data import make_files, run_config

pytestmark = pytest.mark.gpu

WIDE = {  # widths that every recipe can multiply
    "train__precision": "bf16",
    "data__packing": True,  # documents end to end, as Transformer Engine's attention takes them
    "model__language__hidden_size": 256,
    "model__language__ffn_hidden_size": 512,
    "model__visual_head__width": 256,
}
NARROW = ("*.heads.*", "*.output_layer", "*.code_projection", "projector.*")
# Widths of Vicuna-7B (tp=1) and of a visual head of 2048: rows, inputs, outputs.
GEMMS = [
    ("linear_qkv", 8192, 4096, 12288),
    ("linear_fc1", 8192, 4096, 22016),
    ("linear_fc2", 8192, 11008, 4096),
    ("head w1, one depth", 5832, 2048, 4096),
]


def lines_of(files, run, **settings):
    """What a short run on the GPU wrote, in a process of its own."""
    path = run.with_suffix(".yaml")
    config = run_config(files, run, train__log_every_steps=1, **WIDE, **settings)
    path.write_text(yaml.safe_dump(to_dict(config)))
    command = [sys.executable, "-m", "megatron_asvr.cli.main", "train", str(path)]
    subprocess.run(command, env={**os.environ, "ASVR_PLATFORM": "cuda"}, check=True)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(files, run, **settings):
    """Losses and gradient norms of a short run on the GPU."""
    lines = lines_of(files, run, **settings)
    rows = [(line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"]
    assert rows
    return torch.tensor(rows)


def gradients(settings):
    """Losses of a step's micro-batches, and every full gradient, on the one GPU of this rank."""
    run = run_cases.config(**settings)
    groups = initialize(make_plan(run, 1, run_cases.CODEBOOK_SIZES))
    bench = run_cases.Bench(run, groups)
    rows = torch.arange(run.train.micro_batch + 1, dtype=torch.int32)
    batches = [
        dataclasses.replace(batch, cu_seqlens_padded=run_cases.LENGTH * rows)
        for batch in run_cases.step_batches(run, 0, groups)
    ]
    return bench.gradients(batches), bench.step(0, batches).loss


def compare(theirs, ours, *, loss, cosine):
    (got, got_loss), (wanted, wanted_loss) = (
        run_ranks(gradients, (settings,), 1, timeout_s=300) for settings in (theirs, ours)
    )
    assert got_loss == pytest.approx(wanted_loss, rel=loss)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if gradient.any():
            near = torch.cosine_similarity(got[name].flatten(), gradient.flatten(), 0)
            assert float(near) > cosine, name


def test_bf16_losses_and_gradients_are_those_of_the_local_layers():
    te, local = ({**WIDE, "precision__backend": kind} for kind in ("te", "local"))
    compare(te, local, loss=2e-2, cosine=0.99)


@pytest.mark.parametrize("recipe", ["current", "block"])
def test_gradients_in_8_bits_are_those_of_the_emulation(recipe):
    fp8 = {**WIDE, "precision__fp8__recipe": recipe, "precision__fp8__exclude": list(NARROW)}
    te, emulated = {"precision__backend": "te"}, {"precision__fp8__emulate": True}
    # On the CPU, gradients in 8 bits and in bf16 differ by cosines down to 0.91.
    compare({**fp8, **te}, {**fp8, **emulated}, loss=2e-2, cosine=0.9)


@pytest.mark.parametrize("recipe", ["delayed", "current", "block"])
def test_8_bits_are_those_of_the_emulation(tmp_path, recipe):
    files = make_files(tmp_path / "files")
    fp8 = {"precision__fp8__recipe": recipe, "precision__fp8__exclude": NARROW}
    te = numbers(files, tmp_path / "te", precision__backend="te", **fp8)
    emulated = numbers(files, tmp_path / "emulated", precision__fp8__emulate=True, **fp8)
    torch.testing.assert_close(te, emulated, rtol=5e-2, atol=0)


@pytest.mark.parametrize("weights", [False, True])
def test_the_guard_and_weights_in_8_bits(tmp_path, weights):
    files = make_files(tmp_path / "files")
    fp8 = {"precision__fp8__recipe": "current", "precision__fp8__exclude": NARROW}
    more = {"weights": True} if weights else {"guard_every_steps": 1}
    changes = {f"precision__fp8__{key}": value for key, value in more.items()}
    lines = lines_of(files, tmp_path / "run", precision__backend="te", **fp8, **changes)
    if weights:
        plain = numbers(files, tmp_path / "plain", precision__backend="te", **fp8)
        kept = [(x["loss"], x["grad_norm"]) for x in lines if x["kind"] == "train"]
        torch.testing.assert_close(torch.tensor(kept), plain, rtol=5e-2, atol=0)
        return
    verdicts = [line for line in lines if line["kind"] == "fp8"]
    assert verdicts
    for verdict in verdicts:
        assert verdict["moved"] == ""
        assert 0.99 < verdict["least_cosine"] < 1
        assert verdict["loss_fp8"] == pytest.approx(verdict["loss_exact"], rel=2e-2)


@contextlib.contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    yield
    end.record()
    torch.cuda.synchronize()
    seconds.append(start.elapsed_time(end) / 1e3)


@pytest.mark.parametrize(("name", "rows", "inputs", "outputs"), GEMMS)
def test_how_fast_the_products_are(name, rows, inputs, outputs, capsys):
    """Prints TFLOP/s of a linear's forward and backward pass; fails only where it cannot run."""
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    linear = te.Linear(inputs, outputs, bias=False, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(rows, outputs, device="cuda", dtype=torch.bfloat16)
    for recipe in (None, Float8CurrentScaling()):
        seconds: list[float] = []
        for _ in range(13):
            with timed(seconds):
                with te.autocast(enabled=recipe is not None, recipe=recipe):
                    y = linear(x)
                y.backward(gradient)
        assert y.isfinite().all()
        rate = 6 * rows * inputs * outputs / sorted(seconds[3:])[5] / 1e12
        kind = "bf16" if recipe is None else "fp8"
        with capsys.disabled():
            sys.stdout.write(f"{name} {rows} x {inputs} x {outputs} {kind}: {rate:.0f} TFLOP/s\n")
