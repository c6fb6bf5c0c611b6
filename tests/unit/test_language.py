"""The language model: attention rule, dense attention, vocabulary padding, checkpoint names."""

import dataclasses

from megatron_asvr.platforms.cpu import CpuPlatform
from megatron_asvr.platforms.cuda import CudaPlatform

import pytest
import torch
import torch.nn.functional as F

from megatron_asvr import precision
from megatron_asvr.errors import AsvrError
from megatron_asvr.model import sharding
from megatron_asvr.model.language import MASKED_LOGIT, padded_vocab_size
from megatron_asvr.model.megatron_config import transformer_config
from megatron_asvr.parallel.plan import ParallelPlan
from megatron_asvr.precision.local import DenseAttention, attention_rule
from tests.language_cases import CASES, SMALL, build, hidden, one_rank, plain_batch, rule_batch


@pytest.fixture(scope="module")
def groups():
    with one_rank() as made:
        yield made


def ids(*values: int) -> torch.Tensor:
    return torch.tensor([values])


def tokens(num_positions: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SMALL.vocab_size, (1, num_positions), generator=generator)


def test_mask_follows_documents_branches_and_padding():
    document = ids(0, 0, 0, 0, 1, 1, -1)
    branch = ids(0, 1, 1, 2, 0, 1, 0)
    position = ids(0, 1, 2, 1, 0, 1, 0)
    seen = ~attention_rule(rule_batch(document, branch, position), sliding_window=None)[0, 0]
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0],  # the second question sees the prefix and itself
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],  # padding sees itself
    ]


def test_sliding_window_counts_positions_not_indices():
    document = ids(0, 0, 0, 0, 0)
    branch = ids(0, 0, 1, 1, 2)
    position = ids(0, 1, 2, 3, 2)
    seen = ~attention_rule(rule_batch(document, branch, position), sliding_window=2)[0, 0]
    assert seen[3].tolist() == [False, False, True, True, False]
    assert seen[4].tolist() == [False, True, False, False, True]  # index 1 is one position away


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen3"])
def test_questions_of_one_image_equal_separate_samples(case, groups):
    model = build(CASES[case], groups).eval()
    prefix, questions = tokens(6), [tokens(4, seed=1), tokens(5, seed=2)]
    together = torch.cat([prefix, *questions, tokens(2, seed=3)], 1)
    document = ids(*[0] * 15, -1, -1)
    branch = ids(*[0] * 6, *[1] * 4, *[2] * 5, 0, 0)
    position = ids(*range(6), *range(6, 10), *range(6, 11), 0, 0)
    joint_SBH = hidden(model, together, document, branch, position)
    assert joint_SBH.isfinite().all()
    for question, first in zip(questions, (6, 10), strict=True):
        alone = torch.cat([prefix, question], 1)
        alone_SBH = hidden(model, alone, *plain_batch(alone))
        last = first + question.shape[1]
        # measured at most 2.9e-6 over 20 seeds of the three cases
        torch.testing.assert_close(joint_SBH[first:last], alone_SBH[6:], rtol=0, atol=1e-5)
        torch.testing.assert_close(joint_SBH[:6], alone_SBH[:6], rtol=0, atol=1e-5)


def test_documents_restart_their_positions(groups):
    model = build(SMALL, groups).eval()
    first, second = tokens(5), tokens(7, seed=1)
    document, position = ids(*[0] * 5, *[1] * 7), ids(*range(5), *range(7))
    joint_SBH = hidden(
        model, torch.cat([first, second], 1), document, torch.zeros_like(document), position
    )
    for part, found_SBH in ((first, joint_SBH[:5]), (second, joint_SBH[5:])):
        alone_SBH = hidden(model, part, *plain_batch(part))
        torch.testing.assert_close(found_SBH, alone_SBH, rtol=0, atol=1e-5)


def test_padding_leaves_gradients_finite(groups):
    model = build(SMALL, groups)
    row = tokens(6)
    document = ids(0, 0, 0, -1, -1, -1)
    zeros = torch.zeros_like(document)
    hidden(model, row, document, zeros, ids(0, 1, 2, 0, 0, 0))[:3].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_attention_is_softmax_attention(heads, kv_heads, dtype):
    config = transformer_config(SMALL, ParallelPlan(), dtype)
    attention = DenseAttention(config, layer_number=1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, 2, n, 8, generator=generator) for n in (heads, kv_heads, kv_heads))
    mask = torch.rand(2, 1, 9, 9, generator=generator) < 0.5
    mask[:, :, range(9), range(9)] = False
    repeat = heads // kv_heads
    k_all, v_all = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("sbac,tbac->bast", q, k_all) / 8**0.5
    weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
    expected = torch.einsum("bast,tbac->sbac", weights, v_all).flatten(2)
    got = attention(q.to(dtype), k.to(dtype), v.to(dtype), mask)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.03  # bf16 has 8 bits; values up to 3
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=tolerance)


def test_padded_vocabulary_gets_no_probability_and_no_gradient(groups):
    model = build(SMALL, groups)
    row = tokens(8)
    hidden_XH = hidden(model, row, *plain_batch(row))[:, 0]
    logits_XV = model.logits(hidden_XH)
    assert logits_XV.shape == (8, 320)
    assert logits_XV.dtype == torch.float32
    assert (logits_XV[:, 301:] == MASKED_LOGIT).all()
    full_XT = model.logits_full(hidden_XH)
    assert full_XT.shape == (8, 301)
    assert torch.equal(full_XT, logits_XV[:, :301])
    loss = F.cross_entropy(logits_XV, row[0])
    torch.testing.assert_close(loss, F.cross_entropy(full_XT, row[0]))
    loss.backward()
    assert (model.output_layer.weight.grad[301:] == 0).all()
    assert model.output_layer.weight.grad[:301].abs().sum() > 0


def test_padded_vocabulary_is_the_same_for_usual_degrees():
    assert {padded_vocab_size(301, tp) for tp in (1, 2, 4, 8, 64)} == {320}
    assert padded_vocab_size(320, 2) == 320
    assert padded_vocab_size(301, 3) % 3 == 0


def test_bf16_is_near_fp32(groups):
    row = tokens(12)
    small = dataclasses.replace(SMALL, init_std=0.05)
    exact = hidden(build(small, groups), row, *plain_batch(row))
    model = build(small, groups, dtype=torch.bfloat16)
    rough = hidden(model, row, *plain_batch(row))
    assert rough.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (rough.float() - exact).norm() < 0.02 * exact.norm()  # measured 0.0057 over 20 seeds


def test_checkpoint_keys_are_the_canonical_names(groups):
    for config in CASES.values():
        model = build(config, groups)
        state = model.sharded_state_dict(prefix="language_model.")
        keys = {x.key for k, x in state.items() if not k.endswith("_extra_state")}
        assert keys == set(sharding.canonical_names(model, prefix="language_model.").values())


def test_sequence_parallelism_names_the_length_it_needs(groups):
    model = build(SMALL, groups)
    plan = ParallelPlan(tp=2, sp=True, world=2)
    model.groups = dataclasses.replace(groups, plan=plan)
    row = tokens(7)
    with pytest.raises(AsvrError, match=r"7 positions .* multiple of 2"):
        hidden(model, row, *plain_batch(row))


def test_backend_choice_gives_its_reason():
    backend, reason = precision.select_backend(CpuPlatform(), torch.bfloat16)
    assert (backend, "CUDA" in reason) == ("local", True)
    # Its attention has no kernel for fp32, installed or not.
    backend, reason = precision.select_backend(CudaPlatform(), torch.float32)
    assert (backend, "fp32" in reason) == ("local", True)


def test_transformer_engine_learns_the_sliding_window():
    """A token sees itself and ``sliding_window`` - 1 positions before it."""
    assert transformer_config(SMALL, ParallelPlan(), torch.float32).window_size is None
    config = transformer_config(CASES["mistral"], ParallelPlan(), torch.float32)
    assert config.window_size == (CASES["mistral"].sliding_window - 1, 0)
