"""Mixtures of experts: what Hugging Face's models compute, names, and the load-balancing loss."""

import dataclasses
import re
from collections.abc import Mapping

import pytest
import torch
import transformers
from torch import Tensor

from megatron_asvr.config.schema import LanguageConfig
from megatron_asvr.hf import tables
from megatron_asvr.model import sharding
from megatron_asvr.model.language import LanguageModel
from megatron_asvr.precision.routing import Router, balanced
from tests.language_cases import (
    MIXTURES,
    build,
    hidden,
    one_rank,
    plain_batch,
    rule_batch,
    vector,
)

PREFIX = "language_model."
_EXPERT = re.compile(r"decoder\.layers\.(\d+)\.mlp\.experts\.local_experts\.(\d+)\.(\w+)\.weight")
_ROUTER = re.compile(r"decoder\.layers\.(\d+)\.mlp\.router\.weight")
_THEIRS = {"linear_fc1": "gate_up_proj", "linear_fc2": "down_proj"}


@pytest.fixture(scope="module")
def groups():
    with one_rank() as made:
        yield made


def reference(config: LanguageConfig) -> torch.nn.Module:
    """Hugging Face's model of the same shape, with random weights and norms."""
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.width_per_head,
        "num_experts_per_tok": config.experts_per_token,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.init_std,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    torch.manual_seed(3)
    if config.family == "mixtral":
        settings = transformers.MixtralConfig(
            **common, intermediate_size=config.expert_ffn, num_local_experts=config.num_experts
        )
        model = transformers.MixtralForCausalLM(settings)
    else:
        settings = transformers.Qwen3MoeConfig(
            **common,
            moe_intermediate_size=config.expert_ffn,
            num_experts=config.num_experts,
            norm_topk_prob=config.norm_topk_prob,
        )
        model = transformers.Qwen3MoeForCausalLM(settings)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.copy_(vector(name, parameter.shape))
    return model


def translated(config: LanguageConfig, theirs: Mapping[str, Tensor], name: str) -> Tensor:
    """Our tensor ``name`` from Hugging Face's tensors, as transformers holds them in memory."""
    if found := _EXPERT.fullmatch(name):
        layer, expert, linear = found.groups()
        return theirs[f"model.layers.{layer}.mlp.experts.{_THEIRS[linear]}"][int(expert)]
    if found := _ROUTER.fullmatch(name):
        return theirs[f"model.layers.{found[1]}.mlp.gate.weight"]
    dense = dataclasses.replace(config, family="qwen3" if config.qk_norm else "mistral")
    rule = next(rule for rule in tables.text_rules(dense) if rule.name == PREFIX + name)
    return rule.join(lambda part: theirs[part.removeprefix(tables.HF_LM)])


@pytest.mark.parametrize("case", MIXTURES)
def test_logits_and_gradients_equal_transformers(case, groups):
    config = MIXTURES[case]
    theirs = reference(config)
    state = theirs.state_dict()
    model = LanguageModel(config, groups=groups, dtype=torch.float32)
    sharding.load_weights(model, lambda name: translated(config, state, name), groups=groups)
    tokens_BS = torch.randint(
        config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1)
    )
    expected_BST = theirs(input_ids=tokens_BS, use_cache=False).logits
    got_SBT = model.logits_full(hidden(model, tokens_BS, *plain_batch(tokens_BS)))
    torch.testing.assert_close(got_SBT.transpose(0, 1), expected_BST, rtol=0, atol=1e-5)

    weight_BST = torch.randn(expected_BST.shape, generator=torch.Generator().manual_seed(2)) / 100
    (expected_BST * weight_BST).sum().backward()
    (got_SBT.transpose(0, 1) * weight_BST).sum().backward()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in sharding.named(model):
        expected = translated(config, grads, name)
        error = (parameter.grad[: len(expected)] - expected).norm()
        assert error <= 1e-5 * max(expected.norm(), 1e-3), f"{name}: {error} of {expected.norm()}"


def test_no_token_is_dropped(groups):
    """Every token gets k experts, also when all want the same ones."""
    model = build(MIXTURES["mixtral"], groups)
    router = model.decoder.layers[0].mlp.router
    with torch.no_grad():
        router.weight.copy_(torch.arange(4.0)[:, None].expand(4, 32))
    weights_XE, chosen_XE = router(torch.ones(50, 2, 32))
    assert chosen_XE.tolist() == [[False, False, True, True]] * 100
    torch.testing.assert_close(weights_XE.sum(1), torch.ones(100))
    assert model.config.moe_expert_capacity_factor is None


def test_experts_have_global_numbers(groups):
    config = MIXTURES["mixtral"]
    model = build(config, groups)
    names = [name for name, _ in sharding.named(model) if ".1.mlp.experts." in name]
    assert names == [
        f"decoder.layers.1.mlp.experts.local_experts.{e}.linear_fc{i}.weight"
        for e in range(4)
        for i in (1, 2)
    ]
    full = dict(sharding.full_state(model, groups=groups))
    assert full[names[0]].shape == (2 * config.expert_ffn, config.hidden_size)
    assert not torch.equal(full[names[0]], full[names[2]])
    stored = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    for local, name in sharding.canonical_names(model).items():
        assert stored[local].key == name
    assert stored[names[0]].global_shape == full[names[0]].shape


def padded_rows(config: LanguageConfig) -> tuple[Tensor, ...]:
    """Tokens, documents, branches and positions of four rows, each with its own padding."""
    generator = torch.Generator().manual_seed(4)
    tokens_BS = torch.randint(config.vocab_size, (4, 12), generator=generator)
    document_BS, branch_BS, positions_BS = plain_batch(tokens_BS)
    document_BS = document_BS.clone()
    for row, length in enumerate((12, 7, 10, 0)):
        document_BS[row, length:] = -1
    return tokens_BS, document_BS, branch_BS, positions_BS


def gradients(model: LanguageModel, rows: tuple[Tensor, ...], *, split: int) -> dict[str, Tensor]:
    """Gradients of the load-balancing loss alone, from micro-batches of ``split`` rows."""

    def forward() -> Tensor:
        outs = []
        for tokens_BS, document_BS, branch_BS, positions_BS in zip(
            *(x.split(split) for x in rows), strict=True
        ):
            batch = rule_batch(document_BS, branch_BS, positions_BS)
            embeds_SBH = model.embed(tokens_BS)
            mask = model.mask(batch)
            outs.append(model(embeds_SBH, positions_BS, mask, document_BS < 0).sum() * 0)
        return torch.stack(outs).sum()

    model.zero_grad()
    with balanced([model], forward, group=model.groups.tp_cp_dp):
        forward().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def written_out(model: LanguageModel, rows: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Gradients of the formula in ``Router``'s docstring, from what the routers saw."""
    seen: list[Tensor] = []
    routers = [layer.mlp.router for layer in model.decoder.layers]
    hooks = [x.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for x in routers]
    hidden(model, *rows)
    for hook in hooks:
        hook.remove()
    config = model.language_config
    real_X = (rows[1] >= 0).t().flatten()
    loss = torch.zeros(())
    for router, x_SBH in zip(routers, seen, strict=True):
        scores_XE = (x_SBH.flatten(0, 1) @ router.weight.t()).softmax(-1)[real_X]
        chosen_XK = scores_XE.topk(config.experts_per_token).indices
        share_E = torch.bincount(chosen_XK.flatten(), minlength=config.num_experts)
        product = share_E / chosen_XK.numel() * scores_XE.mean(0)
        loss = loss + config.router_aux_loss_coef * config.num_experts * product.sum()
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_load_balancing_loss_does_not_depend_on_micro_batches(groups):
    config = dataclasses.replace(MIXTURES["qwen3_moe"], router_aux_loss_coef=0.5)
    model = build(config, groups)
    rows = padded_rows(config)
    expected = written_out(model, rows)
    name = "decoder.layers.0.mlp.router.weight"
    assert expected[name].norm() > 1e-3
    for split in (4, 2, 1):
        got = gradients(model, rows, split=split)
        for key, grad in expected.items():
            assert (got[key] - grad).norm() <= 1e-5 * max(grad.norm(), 1e-2), f"{split} {key}"
    # Outside ``balanced`` (evaluation, the gradient cosine) there is no such loss.
    model.zero_grad()
    (hidden(model, *rows) * 0).sum().backward()
    assert model.get_parameter(name).grad.norm() == 0


def test_without_a_coefficient_nothing_is_counted(groups):
    model = build(MIXTURES["mixtral"], groups)

    def never() -> None:
        raise AssertionError

    with balanced([model], never, group=groups.tp_cp_dp):
        assert all(x.counts_E is None for x in model.modules() if isinstance(x, Router))
