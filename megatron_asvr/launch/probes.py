"""Small looks at what only a GPU does, each against the CPU or a number: ``asvr gpu-smoke``.

A test runs them on the CPU, where they compare it with itself, to see that they can run at all; a
smoke never does. No bound was measured on a GPU.
"""

import dataclasses
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatron_asvr.platforms import mcore, select  # noqa: F401  (mcore prepares the process)
from megatron_asvr.platforms.adam import FusedAdam

import megatron.core.optimizer
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.jit import jit_fuser
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from PIL import Image
from torch import Tensor

from megatron_asvr.checkpoint.write import HashingFile
from megatron_asvr.config.schema import Fp8Config, LanguageConfig, PrecisionConfig, VisionConfig
from megatron_asvr.data.dali.pipeline import ImageDecoder
from megatron_asvr.errors import ConfigError
from megatron_asvr.launch.rank import init_group, leave_group
from megatron_asvr.model.megatron_config import transformer_config
from megatron_asvr.model.output_loss import OutputLayer, output_loss
from megatron_asvr.model.vision import SiglipEncoder
from megatron_asvr.parallel import groups
from megatron_asvr.parallel.plan import ParallelPlan
from megatron_asvr.precision import fuse_gradients, select_backend, select_fp8
from megatron_asvr.precision.local import DenseAttention, RMSNorm
from megatron_asvr.precision.remake import remade

CPU = torch.device("cpu")
FP32, BF16 = 1e-5, 2e-2  # largest difference, of the largest value; of that type's rounding
LEAST_SHARE = 0.4  # of the data sheet's rate, in a large product or message
SIZE = 8192  # of a large product's factors
REPEATS = 10


class UnfitError(Exception):
    """The machine lacks what a probe looks at; the message says what."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a probe saw.

    Attributes:
        ok: whether it is right.
        measured: the number, with its unit.
        expected: what it is held against.
    """

    ok: bool
    measured: str
    expected: str


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _near(got: Tensor, wanted: Tensor, bound: float, of: str = "the CPU's") -> Found:
    got, wanted = got.detach().to(CPU).double(), wanted.detach().to(CPU).double()
    error = float((got - wanted).abs().max() / wanted.abs().max())
    ok = error <= bound  # false for NaN, too
    return Found(ok=ok, measured=f"{error:.1e} from {of}", expected=f"at most {bound:.0e}")


def _on_both(make: Callable[[torch.device], Tensor], bound: float) -> Found:
    return _near(make(select()[0].device), make(CPU), bound)


def _seconds(call: Callable[[], object]) -> float:
    """Of one call, after one that is not timed."""
    platform = select()[0]
    call()
    platform.synchronize()
    start = time.perf_counter()
    for _ in range(REPEATS):
        call()
    platform.synchronize()
    return (time.perf_counter() - start) / REPEATS


def norm() -> Found:
    """The local norm and its gradient."""
    config = transformer_config(LanguageConfig(), ParallelPlan(), torch.float32)

    def run(device: torch.device) -> Tensor:
        x = _numbers(32, 256).to(device).requires_grad_()
        y = RMSNorm(config, 256).to(device)(x)
        (gradient,) = torch.autograd.grad((y**3).sum(), x)
        return torch.cat([y, gradient])

    return _on_both(run, FP32)


def remade_input() -> Found:
    """Gradients of a linear behind a norm, whose input is kept here and made again on the CPU."""
    config = transformer_config(LanguageConfig(), ParallelPlan(), torch.float32)

    def run(device: torch.device) -> Tensor:
        x, w = (_numbers(32, 256, seed=s).to(device).requires_grad_() for s in (1, 2))
        y = RMSNorm(config, 256).to(device)(x)
        with remade(y):
            z = F.linear(y, w)
        return torch.cat(torch.autograd.grad((z**2).sum(), [x, w]))

    return _on_both(run, 1e-4)  # GPUs may add up in another order


def _streams(length: int) -> list[Tensor]:
    """Queries, keys and values [S, 1, heads, 64]; pairs of queries share a key."""
    return [_numbers(length, 1, heads, 64, seed=heads + i) for i, heads in enumerate((4, 2, 2))]


def _hidden(lengths: tuple[int, ...]) -> Tensor:
    """The dense mask of documents end to end, True = hidden."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (document[:, None] == document).tril()
    return ~seen[None, None]


def attention() -> Found:
    """The local attention of two documents, one by one and under a mask."""
    lengths = (48, 80)
    config = transformer_config(LanguageConfig(), ParallelPlan(), torch.float32)

    def run(device: torch.device) -> Tensor:
        q, k, v = (x.to(device) for x in _streams(sum(lengths)))
        local = DenseAttention(config, 1)
        rules = (torch.tensor([lengths]), _hidden(lengths).to(device))
        return torch.cat([local(q, k, v, rule) for rule in rules])

    return _on_both(run, 1e-4)  # GPUs may add up in another order


def _te(recipe: str = "none") -> object:
    """The module of Transformer Engine's layers.

    Raises:
        UnfitError: it, or the recipe, cannot be had here.
    """
    settings = PrecisionConfig(backend="te", fp8=Fp8Config(recipe=recipe))
    try:
        select_backend(select()[0], torch.bfloat16, settings)
        select_fp8(select()[0], torch.bfloat16, settings)
    except ConfigError as error:
        raise UnfitError(str(error)) from None
    from megatron_asvr.precision import te

    return te


def te_attention() -> Found:
    """Transformer Engine's attention over documents against the dense one, in bf16."""
    te, lengths = _te(), (48, 80)
    device = select()[0].device
    config = transformer_config(
        LanguageConfig(hidden_size=256, num_heads=4, num_kv_heads=2), ParallelPlan(), torch.bfloat16
    )
    streams = [x.to(device, torch.bfloat16) for x in _streams(sum(lengths))]
    wanted = DenseAttention(config, 1)(*streams, _hidden(lengths).to(device))
    with tempfile.TemporaryDirectory() as folder:
        init_group(0, 1, store=dist.FileStore(f"{folder}/store", 1), timeout_s=60.0)
        groups.initialize(ParallelPlan())
        ends = torch.tensor([0, 48, 128], dtype=torch.int32, device=device)
        got = te.packed_attention(config)(*streams, ends)
        groups.destroy()
        leave_group()
    return _near(got, wanted, BF16, "the dense one")


def te_linear() -> Found:
    """Transformer Engine's product against torch's, in bf16, and its rate."""
    te, (x, w) = _te(), _factors()
    error = _near(te.product(x, w, in_8_bits=False), x @ w.T, BF16, "torch's")
    return _at_rate(error, lambda: te.product(x, w, in_8_bits=False), _flop(x, w))


def fp8_linear() -> Found:
    """A product in 8 bits with current scaling against bf16, and both rates."""
    te, (x, w) = _te("current"), _factors()
    error = _near(te.product(x, w, in_8_bits=True), x @ w.T, 0.1, "bf16's")
    rates = [_flop(x, w) / _seconds(lambda b=b: te.product(x, w, in_8_bits=b)) for b in (0, 1)]
    in_bf16, in_8_bits = (f"{rate / 1e12:.3g} TFLOP/s" for rate in rates)
    return Found(
        ok=error.ok and rates[1] > rates[0],
        measured=f"{error.measured}, {in_8_bits}, and {in_bf16} in bf16",
        expected=f"{error.expected}, faster than bf16",
    )


def gemm_rate(size: int = SIZE) -> Found:
    """TFLOP/s of torch's large product in bf16."""
    x, w = _factors(size)
    sound = bool((x @ w.T).isfinite().all())
    found = Found(ok=sound, measured="finite" if sound else "not finite", expected="finite")
    return _at_rate(found, lambda: x @ w.T, _flop(x, w))


def _factors(size: int = SIZE) -> list[Tensor]:
    device = select()[0].device
    return [_numbers(size, size, seed=s).to(device, torch.bfloat16) for s in (1, 2)]


def _flop(x_MK: Tensor, w_NK: Tensor) -> int:
    return 2 * x_MK.numel() * len(w_NK)


def _at_rate(found: Found, call: Callable[[], object], flop: int) -> Found:
    """What was found, and how fast it is; a rate far below the data sheet's fails."""
    rate, peak = flop / _seconds(call), select()[0].peak_flops(torch.bfloat16) or 0
    return Found(
        ok=found.ok and rate >= LEAST_SHARE * peak,
        measured=f"{found.measured}, {rate / 1e12:.3g} TFLOP/s",
        expected=f"{found.expected}, {LEAST_SHARE:.0%} of {peak / 1e12:g} (data sheet; 0: unknown)",
    )


def fused_gradient() -> Found:
    """A weight's gradient, added up inside its product, against torch's."""
    platform = select()[0]
    fused, why = fuse_gradients(platform)
    if not fused:
        raise UnfitError(why)
    x = _numbers(64, 4, 256).to(platform.device, torch.bfloat16)
    w = _numbers(512, 256, seed=1).to(platform.device, torch.bfloat16).requires_grad_()
    w.main_grad = torch.ones_like(w, dtype=torch.float32)
    wanted = 1 + x.float().sum((0, 1)).expand(512, -1)
    linear_with_grad_accumulation_and_async_allreduce(
        x, w, None, True, False, False
    ).sum().backward()
    return _near(w.main_grad, wanted, BF16, "torch's")


def bf16_product() -> Found:
    """A product in bf16 against fp32 on the CPU."""
    x = _numbers(256, 512).bfloat16()
    device = select()[0].device
    return _near(x.to(device) @ x.to(device).T, x.float() @ x.float().T, BF16)


def loss() -> Found:
    """Cross-entropy over a vocabulary, by chunks, with its gradients."""

    def run(device: torch.device) -> Tensor:
        x, w = (
            _numbers(*s, seed=s[0]).to(device).requires_grad_() for s in ((1, 64, 32), (90, 32))
        )
        targets = (torch.arange(64) % 90)[:, None].to(device)
        layer = OutputLayer(weight=w, bias=None, first=0, size=90)
        (value,), _ = output_loss(x, [layer], targets, tp=None)
        gradients = torch.autograd.grad(value, [x, w])
        return torch.cat([value[None], *(g.flatten() for g in gradients)])

    return _on_both(run, FP32)


def adam() -> Found:
    """Three steps of megatron-core's Adam here against ours on the CPU."""

    def steps(kind: type, device: torch.device) -> Tensor:
        p = torch.nn.Parameter(_numbers(1000).to(device))
        optimizer = kind([p], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for seed in range(3):
            p.grad = _numbers(1000, seed=seed).to(device)
            optimizer.step()
        return p

    return _near(
        steps(megatron.core.optimizer.Adam, select()[0].device), steps(FusedAdam, CPU), FP32
    )


def seeded() -> Found:
    """Random numbers of one seed, drawn twice."""
    device = select()[0].device
    draws = [
        torch.randn(10_000, generator=torch.Generator(device).manual_seed(3), device=device)
        for _ in range(2)
    ]
    same = torch.equal(*draws)
    return Found(ok=same, measured="same" if same else "different", expected="same bits")


def pinned_copy(mib: int = 256) -> Found:
    """A batch's way to the device: its numbers, though the host's change at once, and its speed."""
    platform = select()[0]
    x = torch.arange(mib * 2**18, dtype=torch.float32)
    wanted = x.sum(dtype=torch.float64)
    seconds = _seconds(lambda: platform.bring(x))
    moved = platform.bring(x)
    if moved is not x:
        x.zero_()
    right = bool(moved.sum(dtype=torch.float64).to(CPU) == wanted)
    speed = f"{mib * 2**20 / seconds / 1e9:.1f} GB/s"
    return Found(ok=right, measured=f"{speed}, {'right' if right else 'changed'}", expected="right")


def compiled() -> Found:
    """What megatron-core compiles against the same function as it is."""

    def gate(x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return F.silu(left) * right

    x = _numbers(64, 128).to(select()[0].device)
    return _near(jit_fuser(gate)(x), gate(x), FP32, "the function")


def graphed() -> Found:
    """Features of a recorded encoder against itself as it is, for numbers of images that change."""
    config = VisionConfig(
        hidden_size=64, num_layers=3, num_heads=4, ffn_hidden_size=128, image_size=32, patch_size=8
    )
    device = select()[0].device
    pixels_ICHW = _numbers(4, 3, 32, 32).to(device)
    encoder = SiglipEncoder(config).to(device).requires_grad_(False)
    batches = [pixels_ICHW[:number] for number in (4, 2, 3, 4, 2)]
    wanted = [encoder(batch) for batch in batches]
    encoder.graph()
    got = [encoder(batch) for batch in batches]
    return _near(torch.cat(got), torch.cat(wanted), FP32, "the encoder as it is")


def recomputed() -> Found:
    """Gradients through megatron-core's recomputation against the plain ones."""
    x = _numbers(64, 64).to(select()[0].device).requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return F.gelu(x @ x.T)

    def gradient(y: Tensor) -> Tensor:
        x.grad = None
        y.square().sum().backward()
        return x.grad

    got, wanted = map(gradient, (tensor_parallel.checkpoint(layer, False, x), layer(x)))
    return _near(got, wanted, FP32, "the plain one")


def memory(mib: int = 256) -> Found:
    """The highest use of memory, while something is held."""
    platform = select()[0]
    held = torch.ones(mib * 2**18, device=platform.device)
    platform.synchronize()
    peak = platform.peak_memory_bytes()
    ok = peak >= held.nbytes
    return Found(ok=ok, measured=f"{peak // 2**20} MiB", expected=f"at least {mib} MiB are held")


def saved_copy() -> Found:
    """A copy for a background save, while the original changes."""
    x = torch.ones(2**24, device=select()[0].device)
    copied = x.to(CPU, copy=True)
    x.add_(1)
    ok = bool((copied == 1).all())
    return Found(ok=ok, measured="as before" if ok else "changed", expected="as before the change")


def write_speed(mib: int = 256) -> Found:
    """How fast this folder takes a checkpoint's file."""
    data = np.random.default_rng(0).bytes(mib * 2**20)
    with tempfile.TemporaryDirectory(dir=".", prefix=".smoke-") as folder:
        path, start = Path(folder, "file"), time.perf_counter()
        with HashingFile(path) as file:
            file.write(data)
        speed = mib / (time.perf_counter() - start)
        same = path.read_bytes() == data
    text = f"{speed:.0f} MiB/s, {'read back' if same else 'read back otherwise'}"
    return Found(ok=same, measured=text, expected="read back")


def decode(count: int = 256) -> Found:
    """DALI's pixels here against the CPU's, and images a second."""
    random, encoded = np.random.default_rng(0), []
    for _ in range(count):
        small = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    here, there = (
        ImageDecoder(image_size=384, fit="pad", device=device, threads=4)
        for device in (select()[0].device, CPU)
    )
    got, wanted = (torch.cat(made.views(encoded)).to(CPU).int() for made in (here, there))
    difference, rate = (
        int((got - wanted).abs().max()),
        count / _seconds(lambda: here.views(encoded)),
    )
    measured = f"{difference} of 255, {rate:.0f} images/s"
    return Found(ok=difference <= 10, measured=measured, expected="at most 10 (the CPU's from PIL)")


def import_megatron() -> Found:
    """That a process of a rank came this far: megatron-core is imported and prepared."""
    return Found(ok=True, measured=f"runs on {select()[1]}", expected="it can be imported")
