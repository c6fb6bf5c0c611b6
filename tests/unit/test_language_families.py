"""The language model computes what Hugging Face's models compute with the same weights."""

import pytest
import torch
import transformers

from megatron_asvr.config.schema import LanguageConfig
from megatron_asvr.hf import tables
from megatron_asvr.model import sharding
from megatron_asvr.model.language import LanguageModel
from tests.language_cases import CASES, hidden, one_rank, plain_batch, vector

# float32: measured at most 4.9e-6 over 20 seeds, on logits up to 6.
TOLERANCE = 1e-5
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@pytest.fixture(scope="module")
def groups():
    with one_rank() as made:
        yield made


def reference(config: LanguageConfig) -> torch.nn.Module:
    """Hugging Face's model of the same shape, with random weights, norms and biases."""
    kind = CLASSES[config.family]
    extra = {"sliding_window": config.sliding_window} if config.family == "mistral" else {}
    settings = getattr(transformers, f"{kind}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.width_per_head,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tied_embeddings,
        initializer_range=config.init_std,
        attn_implementation="eager",
        **extra,
    )
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(settings)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.copy_(vector(name, parameter.shape))
    return model


def random_tokens(config: LanguageConfig, num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (num_rows, 17), generator=generator)


def ours(config: LanguageConfig, theirs: torch.nn.Module, groups) -> LanguageModel:
    state = theirs.state_dict()
    rules = {rule.name: rule for rule in tables.text_rules(config)}
    model = LanguageModel(config, groups=groups, dtype=torch.float32)
    sharding.load_weights(
        model,
        lambda name: rules[name].join(lambda part: state[part.removeprefix(tables.HF_LM)]),
        groups=groups,
        prefix="language_model.",
    )
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case, groups):
    config = CASES[case]
    theirs = reference(config)
    model = ours(config, theirs, groups)
    tokens_BS = random_tokens(config, 2)
    expected_BST = theirs(input_ids=tokens_BS, use_cache=False).logits
    got_SBT = model.logits_full(hidden(model, tokens_BS, *plain_batch(tokens_BS)))
    torch.testing.assert_close(got_SBT.transpose(0, 1), expected_BST, rtol=0, atol=TOLERANCE)

    weight_BST = torch.randn(expected_BST.shape, generator=torch.Generator().manual_seed(2)) / 100
    (expected_BST * weight_BST).sum().backward()
    (got_SBT.transpose(0, 1) * weight_BST).sum().backward()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    names = sharding.canonical_names(model, prefix="language_model.")
    rules = {rule.name: rule for rule in tables.text_rules(config)}
    for local, parameter in model.named_parameters():
        rule = rules[names[local]]
        expected = rule.join(lambda part: grads[part.removeprefix(tables.HF_LM)])
        got = parameter.grad[: expected.shape[0]]
        error = (got - expected).norm()
        # measured at most 2.9e-6 over 20 seeds; attention key biases have no gradient at all
        assert error <= 1e-5 * max(expected.norm(), 1e-3), f"{local}: {error} of {expected.norm()}"


def test_the_sliding_window_matters(groups):
    config = CASES["mistral"]
    assert config.sliding_window < 17
    tokens_BS = random_tokens(config, 1)
    model = ours(config, reference(config), groups)
    document_BS, branch_BS, positions_BS = plain_batch(tokens_BS)
    limited = hidden(model, tokens_BS, document_BS, branch_BS, positions_BS)
    causal_B1SS = torch.ones(1, 1, 17, 17, dtype=torch.bool).triu(1)
    full = model(model.embed(tokens_BS), positions_BS, causal_B1SS)
    torch.testing.assert_close(limited[:5], full[:5])
    assert (limited[5:] - full[5:]).abs().max() > 1e-2
