"""A linear compared with itself from outside is judged as by the emulation, which sees inside."""

import contextlib
from collections.abc import Iterator
from functools import partial

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from megatron_asvr.config.schema import Config, Fp8Config
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.precision.fp8.drift import Drift, cosines, shares
from megatron_asvr.precision.fp8.product import Product, linear
from megatron_asvr.precision.fp8.shadow import Layer
from megatron_asvr.precision.fp8.watched import Watched
from megatron_asvr.train.drift import Verdict, judge
from tests.language_cases import one_rank
from tests.run_cases import Bench, step_batches
from tests.unit.test_fp8_guard import BAD, frozen, plant

CPU = torch.device("cpu")


@contextlib.contextmanager
def switched(product: Product, on: bool) -> Iterator[None]:
    before, product.is_on = product.is_on, on
    try:
        yield
    finally:
        product.is_on = before


class NormLinear(nn.Module):
    """A norm and a linear in one, as Transformer Engine has them, which only tells its output."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(0.1 * torch.randn(256, 128, generator=draw))
        self.layer_norm_weight = nn.Parameter(1 + torch.rand(128, generator=draw))
        self.eps, self.product = 1e-6, product

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
        return linear(x, self.weight, None, self.product), None


@pytest.mark.parametrize("trains", ["all", "input", "weights", "nothing"])
@pytest.mark.parametrize("recipe", ["current", "block", "mxfp8"])
def test_a_linear_is_judged_from_outside_as_from_inside(recipe: str, trains: str) -> None:
    settings = Fp8Config(recipe=recipe)
    inside, outside, rounding = (Product("some", settings, device=CPU) for _ in range(3))
    seeing, shadowed = NormLinear(inside), NormLinear(outside)
    layer = Layer(
        shadowed,
        rounding,
        exactly=partial(switched, outside, False),
        in_8_bits=partial(switched, outside, True),
    )
    x = torch.randn(3, 43, 128, generator=torch.Generator().manual_seed(2))
    gradient = torch.randn(3, 43, 256, generator=torch.Generator().manual_seed(3))
    inside.drift, layer.drift = Drift(device=CPU), Drift(device=CPU)
    grads = []
    for module in (seeing, shadowed):
        module.requires_grad_(trains in ("all", "weights"))
        given = x.clone().requires_grad_(trains in ("all", "input"))
        y, _ = module(given)
        if y.requires_grad:
            y.backward(gradient)
        grads.append([y.detach(), given.grad, *(p.grad for p in module.parameters())])
    for mine, theirs in zip(*grads, strict=True):  # exact results are what goes on
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)
    got, wanted = cosines(layer.drift.products), cosines(inside.drift.products)
    assert [c is None for c in got] == [
        False,
        trains not in ("all", "input"),
        trains not in ("all", "weights"),
    ]
    assert got[0] == pytest.approx(wanted[0], rel=1e-12)
    if got[2] is not None:
        assert got[2] == pytest.approx(wanted[2], rel=1e-12)
    if got[1] is not None:  # of the norm's input here, of the matrix's input there
        assert 1 - got[1] == pytest.approx(1 - wanted[1], rel=0.05)
        assert 1 - got[1] > 1e-4
    if recipe == "current" and trains == "all":
        assert shares(layer.drift.values) == shares(inside.drift.values)
    layer.drift, layer.is_on = None, False
    exact = shadowed(x)[0]
    layer.is_on = True
    assert not torch.equal(shadowed(x)[0], exact)


def watch_from_outside(bench: Bench) -> dict[str, Layer]:
    """Let the guard see megatron-core's linears from outside, though the emulation multiplies."""
    run, layers = bench.run, {}
    for module in bench.model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            product = getattr(module, "fp8", None)
            if product is not None and not product.name.endswith("output_layer"):
                layers[product.name] = Layer(
                    module,
                    Product(product.name, run.precision.fp8, device=CPU),
                    exactly=partial(switched, product, False),
                    in_8_bits=partial(switched, product, True),
                )
    products = {**bench.model.watched.products, **layers}
    bench.model.watched = Watched(products, groups=bench.groups, device=CPU)
    return layers


def verdicts(run: Config, groups: Groups) -> list[Verdict]:
    """What the guard says of a planted bad linear that it sees from inside, and from outside."""
    found = []
    for bench in (Bench(run, groups), Bench(run, groups)):
        plant(bench)
        if found:
            assert len(watch_from_outside(bench)) == 8
        batches = step_batches(run, 0, groups)
        loss = bench.loss(batches)
        found.append(judge(bench.wrapped, batches, loss, run.precision.fp8, groups=groups))
        assert not bench.model.watched.products[BAD].is_on
    return found


def assert_same(
    inside: Verdict, outside: Verdict, within: float = 1e-6, shares: bool = True
) -> None:
    """Equal verdicts, with or without the shares of values that are lost."""
    assert outside.moved == inside.moved == (BAD,)
    assert outside.values.keys() == inside.values.keys()
    compared = [name for name in inside.values if shares or not name.endswith("flow")]
    for name in compared:
        value = inside.values[name]
        same = value if value is None or name == "moved" else pytest.approx(value, rel=within)
        assert outside.values[name] == same, name


def test_the_guard_finds_a_planted_linear_that_it_sees_from_outside_only() -> None:
    """The linears of megatron-core, by whatever multiplies them, are those of the emulation."""
    with one_rank() as groups:
        assert_same(*verdicts(frozen("current"), groups))
