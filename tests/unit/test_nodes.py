"""Parts of the layers as single nodes of the graph, against torch's own operations."""

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron)

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from torch.nn import functional as F

from megatron_asvr.model.megatron_config import transformer_config
from megatron_asvr.parallel.plan import ParallelPlan
from megatron_asvr.precision.local import DenseAttention, attention_rule
from megatron_asvr.precision.nodes import gated, rotated
from megatron_asvr.precision.norm import RMSNorm
from megatron_asvr.precision.products import into_buffers, look_up, multiply, multiply_each
from megatron_asvr.precision.remake import kept_whole, remade
from tests.language_cases import SMALL, one_rank, rule_batch

SHAPES = ((4, 5, 6), (2, 3, 6), (2, 3), (4, 5, 6), (4, 7, 6))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def grads(result, leaves):
    wanted = drawn(*result.shape, seed=9).detach()
    return torch.autograd.grad((result.float() * wanted).sum(), leaves, retain_graph=True)


def test_gated_activation():
    x = drawn(5, 3, 14)
    a, b = x.chunk(2, -1)
    plain = F.silu(a) * b
    assert torch.equal(gated(x), plain)
    # measured 1.2e-7
    torch.testing.assert_close(grads(gated(x), [x]), grads(plain, [x]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_megatrons(dtype):
    x = drawn(6, 2, 3, 4, 8)  # groups of two queries, a key and a value
    packed = x.to(dtype)
    angle = drawn(6, 2, 1, 4, seed=1).detach()
    angle = torch.cat([angle, angle], -1)
    config = transformer_config(SMALL, ParallelPlan(), dtype)
    query, key, value = packed.split((2, 1, 1), -2)
    with one_rank() as groups:
        plain = [
            apply_rotary_pos_emb(part.flatten(2, 3), angle, config=config, cp_group=groups.cp)
            for part in (query, key)
        ]
    found = rotated(packed, angle.squeeze(2), sizes=(2, 1, 1))
    bound = 1e-6 if dtype == torch.float32 else 0.05
    pairs = zip(found, [*plain, value.flatten(2, 3)], strict=True)
    for part, wanted in pairs:
        part = part.flatten(2, 3)
        assert (part.is_contiguous(), part.dtype) == (True, dtype)
        torch.testing.assert_close(part, wanted, rtol=0, atol=bound)
        torch.testing.assert_close(grads(part, [x]), grads(wanted, [x]), rtol=0, atol=bound)


def rule(document, branch=None, position=None):
    document = torch.tensor(document)
    index = torch.arange(document.shape[1]).expand_as(document)
    branch = torch.zeros_like(document) if branch is None else torch.tensor(branch)
    return rule_batch(document, branch, index if position is None else position)


def test_documents_one_by_one_are_those_under_the_mask():
    batch = rule([[0, 0, 0, 1, 1, 2, -1, -1], [3, 3, 3, 3, 3, 3, 3, 3]])
    lengths = attention_rule(batch, sliding_window=None)
    assert lengths.tolist() == [[3, 2, 1, 2], [8, 0, 0, 0]]
    assert torch.equal(lengths, attention_rule(batch, sliding_window=8))
    document = batch.document_BS
    hidden = (document[:, :, None] != document[:, None]) | ~torch.ones(8, 8).tril().bool()
    attention = DenseAttention(
        transformer_config(SMALL, ParallelPlan(), torch.float32), layer_number=1
    )
    three = [drawn(8, 2, heads, 8, seed=heads) for heads in (4, 2, 2)]
    one_by_one, dense = (attention(*three, mask) for mask in (lengths, hidden[:, None]))
    torch.testing.assert_close(one_by_one, dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads(one_by_one, three), grads(dense, three), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["branches", "window", "ranks"])
def test_what_lengths_cannot_say_takes_a_mask(case):
    batch = rule([[0, 0, 0, 1]], [[0, 0, 1, 0]] if case == "branches" else None)
    batch.context = (0, 2 if case == "ranks" else 1)
    found = attention_rule(batch, sliding_window=2 if case == "window" else None)
    assert found.dtype == torch.bool


def kept_numbers(run, x, *others):
    """How many numbers, ``x`` and others left out, wait for the backward pass of ``run(x)``."""
    kept = {}
    known = {other.data_ptr() for other in (x, *others)}

    def keep(saved):
        if saved.data_ptr() not in known:
            kept[saved.data_ptr()] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        result = run(x)
    return sum(saved.numel() for saved in kept.values()), result


def test_a_linear_behind_a_norm_keeps_nothing_and_computes_the_same_bits():
    norm, linear = RMSNorm(16, eps=1e-5), torch.nn.Linear(16, 8)
    x, leaves = drawn(50, 16), [*norm.parameters(), *linear.parameters()]

    def remaking(x):
        y = norm(x)
        with remade(y):
            return linear(y)

    few, result = kept_numbers(remaking, x, *leaves)
    with kept_whole():
        many, plain = kept_numbers(remaking, x, *leaves)
    assert (few, many) == (50, 50 + 50 * 16)  # the inverse roots; and the norm
    for a, b in zip(grads(result, [x, *leaves]), grads(plain, [x, *leaves]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_add_to_the_buffers_of_their_weights(dtype):
    leaves = [drawn(*shape, seed=n) for n, shape in enumerate(SHAPES)]
    x, weight, bias, each_x, each = (leaf.detach().to(dtype).requires_grad_() for leaf in leaves)
    plain = multiply(x, weight, bias), multiply_each(each_x, each)
    wanted = [grads(plain[0], [x, weight, bias]), grads(plain[1], [each_x, each])]
    for leaf in (weight, each):
        leaf.main_grad = torch.ones_like(leaf, dtype=torch.float32)
    with into_buffers():
        found = multiply(x, weight, bias), multiply_each(each_x, each)
    got = [grads(found[0], [x, bias]), grads(found[1], [each_x])]
    bound = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(found, plain, **bound)
    torch.testing.assert_close(got[0], (wanted[0][0], wanted[0][2]), **bound)
    torch.testing.assert_close(got[1], wanted[1][:1], **bound)
    for leaf, gradient in ((weight, wanted[0][1]), (each, wanted[1][1])):
        torch.testing.assert_close(leaf.main_grad - 1, gradient.float(), **bound)


def test_an_embedding_adds_to_its_buffer():
    table, ids = drawn(9, 4), torch.tensor([[3, 0, 3], [8, 3, 1]])
    (wanted,) = grads(look_up(table, ids), [table])
    table.main_grad = torch.ones_like(table)
    with into_buffers():
        found = look_up(table, ids)
    assert torch.equal(found, look_up(table, ids))
    (found.float() * drawn(*found.shape, seed=9).detach()).sum().backward()
    assert table.grad is None
    torch.testing.assert_close(table.main_grad - 1, wanted, rtol=1e-6, atol=1e-6)
