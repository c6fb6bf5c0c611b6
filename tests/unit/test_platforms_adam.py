"""The CPU's FusedAdam: torch's arithmetic, apex's layout."""

import copy

from megatron_asvr.platforms.adam import FusedAdam

import pytest
import torch

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def steps(make, num_steps=5):
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (5,), ()]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    optimizer = make(params)
    for _ in range(num_steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize(
    ("decoupled", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)]
)
def test_the_steps_are_torchs(decoupled, reference):
    ours, _ = steps(lambda p: FusedAdam(p, adam_w_mode=decoupled, **SETTINGS))
    theirs, _ = steps(lambda p: reference(p, **SETTINGS))
    for mine, other in zip(ours, theirs, strict=True):
        # measured 1.2e-7: the same formula, rounded in another order
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_without_bias_correction_the_first_step_is_larger_by_the_roots_ratio():
    corrected, _ = steps(lambda p: FusedAdam(p, lr=1e-2, eps=0.0), 1)
    plain, _ = steps(lambda p: FusedAdam(p, lr=1e-2, eps=0.0, bias_correction=False), 1)
    start, _ = steps(lambda p: FusedAdam(p), 0)
    ratio = (1 - 0.9) / (1 - 0.999) ** 0.5
    for c, p, s in zip(corrected, plain, start, strict=True):
        torch.testing.assert_close((p - s).detach(), ((c - s) * ratio).detach())


def test_the_same_steps_give_the_same_bits():
    first, _ = steps(lambda p: FusedAdam(p, **SETTINGS))
    second, _ = steps(lambda p: FusedAdam(p, **SETTINGS))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_how_parameters_are_cut_changes_no_bit():
    generator = torch.Generator().manual_seed(0)
    x, grads = torch.randn(1003, generator=generator), torch.randn(3, 1003, generator=generator)

    def train(sizes):
        parts = [torch.nn.Parameter(part.clone()) for part in x.split(sizes)]
        optimizer = FusedAdam(parts, **SETTINGS)
        for grad in 1e-3 * grads:
            for part, piece in zip(parts, grad.split(sizes), strict=True):
                part.grad = piece
            optimizer.step()
        return torch.cat([*parts, *(optimizer.state[p]["exp_avg_sq"] for p in parts)])

    whole = train([1003])
    for sizes in ([1, 1002], [500, 503], [7] * 143 + [2]):
        assert torch.equal(train(sizes), whole)


def test_the_step_is_kept_in_the_group_and_moments_in_fp32():
    params, optimizer = steps(lambda p: FusedAdam(p, **SETTINGS))
    assert [group["step"] for group in optimizer.param_groups] == [5]
    for p in params:
        assert set(optimizer.state[p]) == {"exp_avg", "exp_avg_sq"}
        assert all(x.dtype == torch.float32 for x in optimizer.state[p].values())


def test_resumed_from_its_state_it_continues_bit_by_bit():
    params, optimizer = steps(lambda p: FusedAdam(p, **SETTINGS), 3)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = FusedAdam(copies, **SETTINGS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, twin in zip(params, copies, strict=True):
        p.grad = torch.full_like(p, 0.3)
        twin.grad = p.grad.clone()
    optimizer.step()
    resumed.step()
    assert all(torch.equal(p, c) for p, c in zip(params, copies, strict=True))


def test_a_parameter_without_a_gradient_stays():
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = FusedAdam([p, q], **SETTINGS)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(q, torch.ones(3))
    assert not torch.equal(p, torch.ones(3))
    assert q not in optimizer.state


def test_moments_are_parts_of_one_piece_of_memory():
    params, optimizer = steps(lambda p: FusedAdam(p, **SETTINGS))
    for name in ("exp_avg", "exp_avg_sq"):
        moments = [optimizer.state[p][name] for p in params]
        assert len({x.untyped_storage().data_ptr() for x in moments}) == 1
        assert [x.shape for x in moments] == [p.shape for p in params]
