"""The CPU's kernels against their twins in torch, and what happens where they cannot be built."""

import logging
import os
import subprocess
import sys
from pathlib import Path

from megatron_asvr.platforms import kernels

import pytest
import torch

from megatron_asvr.precision import depths, norm, softmax

# Measured, in the norm: fp32 at most 3e-7; bf16 3e-3, whose twin rounds probabilities as well.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
QUICK = ["-O0", "-std=c++17", "-shared", "-fPIC"]  # flags of the compiler
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture
def used():
    assert kernels.use(True)[0]


def far(got, wanted):
    """Distance relative to the norm; infinite where one is no number and the other is."""
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    if not torch.equal(got.isnan(), wanted.isnan()):
        return float("inf")
    got, wanted = got.nan_to_num().double(), wanted.nan_to_num().double()
    return float((got - wanted).norm() / wanted.norm().clamp(min=1e-30))


def attended(function, packed, heads, grad):
    leaf = packed.detach().requires_grad_()
    out = function(leaf, heads)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


@DTYPES
@pytest.mark.parametrize(
    ("depth", "positions", "heads", "width"),
    [(8, 20, 4, 128), (1, 3, 2, 5), (5, 7, 3, 17), (32, 2, 1, 33), (40, 2, 1, 3), (4, 0, 2, 8)],
)
def test_attention_over_depth_is_its_twin(used, dtype, depth, positions, heads, width):
    torch.manual_seed(0)
    packed = torch.randn(depth, positions, 3 * heads * width).to(dtype)
    grad = torch.randn(depth, positions, heads * width).to(dtype)
    got = attended(depths.attend_depths, packed, heads, grad)
    wanted = attended(depths.twin, packed.double(), heads, grad.double())
    for a, b in zip(got, wanted, strict=True):
        assert far(a.double(), b) <= TOLERANCE[dtype]


@DTYPES
def test_attention_passes_on_what_is_no_number(used, dtype):
    packed = torch.randn(3, 4, 3 * 2 * 8)
    packed[1, 0, 0], packed[2, 1, 16 + 3], packed[0, 2, 32] = torch.nan, torch.nan, torch.nan
    packed[1, 3, 8] = torch.inf
    packed = packed.to(dtype)
    out, grad = attended(depths.attend_depths, packed, 2, torch.ones(3, 4, 16, dtype=dtype))
    # A position, a head: depths from the first that reads the planted value.
    bad = out.unflatten(-1, (2, 8)).isnan().any(-1)
    wanted = [[0, 2, 0], [1, 0, 0], [1, 2, 0], [1, 3, 1], [2, 1, 0], [2, 2, 0]]
    assert bad.nonzero().tolist() == wanted
    assert grad.isnan().any(0).any(-1).all()


def test_peaked_scores_do_not_overflow(used):
    torch.manual_seed(0)
    packed, grad = 100 * torch.randn(6, 5, 3 * 2 * 16), torch.ones(6, 5, 32)
    got = attended(depths.attend_depths, packed, 2, grad)
    wanted = attended(depths.twin, packed.double(), 2, grad.double())
    for a, b in zip(got, wanted, strict=True):
        assert far(a.double(), b) <= 1e-2  # scores of 1e5 have an error of 1e-2 in fp32


def test_the_number_of_threads_changes_no_bit(used):
    packed, grad = torch.randn(8, 50, 3 * 4 * 32), torch.randn(8, 50, 4 * 32)
    one = attended(depths.attend_depths, packed, 4, grad)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        two = attended(depths.attend_depths, packed, 4, grad)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def losses(logits, columns, dtype):
    """By the kernel, and by the twin in fp64: loss, target on top, gradient, rounded or not."""
    wanted = logits.double()
    loss, is_top = softmax.twin(wanted, columns, None)
    held = logits.clone()
    got = softmax.to_gradient(held, columns, None, dtype)
    return (*got, held), (loss, is_top, wanted, wanted)


@DTYPES
@pytest.mark.parametrize("rows_words", [(7, 16384), (3, 1025), (5, 1), (1, 17)], ids=str)
@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
def test_the_gradient_of_the_softmax_is_its_twin(used, dtype, rows_words, scale):
    torch.manual_seed(0)
    logits = scale * torch.randn(rows_words)
    columns = torch.randint(-2, rows_words[1] + 2, rows_words[:1])  # some belong to other ranks
    logits[0, columns[0].clamp(0, rows_words[1] - 1)] = logits.max()  # a tie
    (loss, is_top, gradient, held), wanted = losses(logits, columns, dtype)
    assert torch.equal(is_top, wanted[1])
    torch.testing.assert_close(loss.double(), wanted[0], rtol=1e-6, atol=1e-6)  # measured 3e-7
    assert far(held.double(), wanted[2]) <= 1e-6
    assert gradient.dtype == dtype
    assert torch.equal(gradient, held.to(dtype))


@DTYPES
def test_the_softmax_passes_on_what_is_no_number(used, dtype):
    logits = torch.randn(6, 40)
    logits[1, 3], logits[2, 39] = torch.nan, torch.inf
    logits[3], logits[4, :39] = -torch.inf, -torch.inf
    columns = torch.tensor([0, 1, 2, 3, 39, 5])
    (loss, _, gradient, held), wanted = losses(logits, columns, dtype)
    assert loss.isnan().tolist() == [False, True, True, True, False, False]
    assert torch.equal(loss.isnan(), wanted[0].isnan())
    for got in (gradient, held):
        assert torch.equal(got.isnan(), wanted[2].isnan())
    assert float(loss[4]) == 0
    assert gradient[4].eq(0).all()


def normed(made, x, grad, dtype):
    leaf = x.to(dtype).requires_grad_()
    made = made.to(dtype)
    y = made(leaf)
    return (y.detach(), *torch.autograd.grad(y, (leaf, made.weight), grad.to(dtype)))


@DTYPES
@pytest.mark.parametrize("shape", [(3, 130, 512), (1, 5), (7, 33), (0, 8)], ids=str)
def test_the_norm_is_its_twin(used, dtype, shape):
    torch.manual_seed(0)
    made = norm.RMSNorm(shape[-1], eps=1e-5)
    with torch.no_grad():
        made.weight.normal_()
    made, x = made.to(dtype), torch.randn(shape).to(dtype)
    grad = torch.randn(shape).to(dtype)
    got = normed(made, x, grad, dtype)
    wanted = normed(made, x, grad, torch.float64)
    for a, b in zip(got, wanted, strict=True):
        assert far(a.double(), b) <= TOLERANCE[dtype]


@DTYPES
def test_the_norm_passes_on_what_is_no_number(used, dtype):
    made, x = norm.RMSNorm(16, eps=1e-5).to(dtype), torch.randn(4, 16)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    y, grad_x, grad_weight = normed(made, x, torch.ones(4, 16), dtype)
    rows = [False, True, True, False]
    assert y.isnan().any(1).tolist() == grad_x.isnan().any(1).tolist() == rows
    assert grad_weight.isnan().all()


def test_what_fits_no_kernel_takes_the_twin(used, monkeypatch):
    calls = []
    monkeypatch.setattr(depths, "twin", lambda *given: calls.append(given))
    packed = torch.randn(2, 3, 3 * 8)
    for other in (packed.double(), packed.half(), packed.to("meta")):
        depths.attend_depths(other, 2)
    kernels.use(False)
    depths.attend_depths(packed, 2)
    assert len(calls) == 4
    kernels.use(True)
    assert depths.attend_depths(packed, 2).shape == (2, 3, 8)


def compiler(folder: Path, text: str) -> Path:
    """A program that is found in place of the compiler."""
    path = folder / "bin" / kernels.COMPILERS[0]
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (None, "no compiler: none of g++, c++, clang++ is on PATH"),
        ("echo no such option >&2; exit 1", "g++ failed: no such option"),
        ("exit 1", "g++ failed: without a word"),
        ("echo 1; for last; do :; done; case $last in /*) : > $last;; esac", "built or loaded"),
    ],
)
def test_without_a_compiler_that_works_torch_does_it_and_the_log_says_why(
    program, says, monkeypatch, tmp_path, caplog
):
    if program is not None:
        compiler(tmp_path, program)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.INFO, "megatron_asvr"):
        used, reason = kernels.use(True)
    assert not used
    (line,) = (record for record in caplog.records if record.name == kernels.__name__)
    assert line.levelname == "WARNING"
    assert f"torch's own operations instead: {reason}" in line.getMessage()
    packed = torch.randn(2, 3, 3 * 8)
    assert torch.equal(depths.attend_depths(packed, 2), depths.twin(packed, 2))
    assert says in reason


def test_kernels_that_are_switched_off_are_not_looked_for(monkeypatch):
    monkeypatch.setattr(kernels, "load", lambda: pytest.fail("it was looked for"))
    assert kernels.use(False) == (False, "precision.kernels=false")
    assert kernels.decided() == (False, "precision.kernels=false")


def test_a_damaged_file_is_built_again_and_a_whole_one_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "FLAGS", QUICK)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.load()[0] is not None
    (path,) = tmp_path.rglob("kernels-*.so")
    whole = path.read_bytes()
    written = path.stat().st_mtime_ns
    assert kernels.load()[0] is not None
    assert path.stat().st_mtime_ns == written
    for damaged in (whole[:-100], whole[:5000], b"", whole[:1000] + b"x" + whole[1001:]):
        path.unlink()  # it may be mapped
        path.write_bytes(damaged)
        assert kernels.load()[0] is not None
        assert path.read_bytes() == whole
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_processes_that_build_at_once_do_not_disturb_one_another(tmp_path):
    code = (
        "from megatron_asvr.platforms import kernels; import sys; "
        f"kernels.FLAGS = {QUICK}; sys.exit(not kernels.load()[0])"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(100) for process in started] == [0, 0]
    assert len(list((tmp_path / "megatron_asvr" / "kernels").iterdir())) == 1


def test_what_others_may_have_written_is_not_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "FLAGS", QUICK)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.load()[0] is not None
    (path,) = tmp_path.rglob("kernels-*.so")
    path.chmod(0o722)
    written = path.stat().st_mtime_ns
    assert kernels.load()[0] is not None
    assert path.stat().st_mtime_ns != written  # built again
    path.parent.chmod(0o777)
    library, why = kernels.load()
    assert library is None
    assert why.startswith(f"others may write to {path.parent}; ")


def test_without_a_home_torch_does_it(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert kernels.load() == (None, "they cannot be built or loaded: no home")
