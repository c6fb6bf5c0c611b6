"""Products with fp32 results, of bf16 and of fp32 matrices."""

import pytest
import torch

from megatron_asvr.precision import matmul
from megatron_asvr.precision.matmul import add_product


@pytest.fixture(params=["MKL", "torch"])
def engine(request, monkeypatch):
    """Products by MKL where torch brings it, and by what replaces it elsewhere."""
    if request.param == "torch":
        monkeypatch.setattr(matmul, "_mkl", lambda: None)
    elif matmul._mkl() is None:
        pytest.skip("torch has no MKL here")


def matrices(m, n, k, dtype):
    generator = torch.Generator().manual_seed(m + n + k)
    shapes = ((m, n), (m, k), (k, n))
    total, a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    return total, a.to(dtype), b.to(dtype)


def error(got, wanted):
    return ((got - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("sizes", [(5, 7, 33), (1, 7, 3), (5, 1, 3), (5, 7, 1), (1, 1, 1)])
@pytest.mark.parametrize("turned", [(), (0,), (1,), (0, 1)])
def test_bf16_products_are_added_in_fp32(engine, sizes, turned):
    total, a, b = matrices(*sizes, torch.bfloat16)
    wanted = 0.5 * total.double() + 3.0 * (a.double() @ b.double())
    operands = [x.mT.contiguous().mT if n in turned else x for n, x in enumerate((a, b))]
    add_product(total, *operands, scale=3.0, keep=0.5)
    assert error(total, wanted) < 1e-6


def test_parts_of_larger_matrices_are_read_and_written_where_they_lie(engine):
    total, a, b = matrices(6, 8, 10, torch.bfloat16)
    wanted = total.double()
    wanted[1:4, 2:7] = a[2:5, ::2].double() @ b[:5, 2:7].double()
    add_product(total[1:4, 2:7], a[2:5, ::2], b[:5, 2:7], keep=0.0)
    assert error(total, wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stacks_and_empty_sums(engine, dtype):
    total = torch.full((2, 3, 4), float("nan"))
    a, b = torch.randn(2, 3, 5).to(dtype), torch.randn(2, 4, 5).to(dtype)
    add_product(total, a, b.mT, keep=0.0)
    assert error(total, a.double() @ b.double().mT) < 1e-6
    add_product(total, a[..., :0], b[..., :0].mT, keep=0.0)
    assert total.eq(0).all()
    add_product(total[:, :0], a[:, :0], b.mT)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[:1].expand(5, 7),
        lambda x: x[:, :1].expand(5, 7),
        lambda x: x[:1, :1].expand(5, 7),
        lambda x: x.flatten().as_strided((5, 7), (1, 1)),
        lambda x: x[:, ::2].repeat_interleave(2, 1)[:, :7],
    ],
    ids=["a row", "a column", "a number", "overlapping", "copied"],
)
@pytest.mark.parametrize("turned", [False, True])
def test_matrices_that_repeat_numbers_are_read_as_they_are(engine, make, turned):
    repeated = make(torch.randn(5, 7).bfloat16())
    other, total = torch.randn(7, 6).bfloat16(), torch.zeros(5, 6)
    wanted = repeated.double() @ other.double()
    if turned:
        total = torch.zeros(6, 5)
        add_product(total, other.mT, repeated.mT)
        total = total.mT
    else:
        add_product(total, repeated, other)
    assert error(total, wanted) < 1e-6


def test_what_is_no_number_stays_none(engine):
    total, a, b = matrices(4, 4, 4, torch.bfloat16)
    a[2, 1] = float("nan")
    add_product(total, a, b)
    assert total.isnan().any(1).tolist() == [False, False, True, False]


def test_fp32_products_are_torchs(engine):
    total, a, b = matrices(5, 7, 33, torch.float32)
    wanted = torch.addmm(total, a, b, alpha=2.0)
    add_product(total, a, b, scale=2.0)
    assert torch.equal(total, wanted)
