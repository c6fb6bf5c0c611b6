"""Every family and rope scaling: a folder of transformers comes in, computes the same, goes out.

The folder is written by transformers from its own random model; what goes out must hold the same
bytes under the same names.
"""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_asvr.config.check import check
from megatron_asvr.config.load import from_dict, override, to_dict
from megatron_asvr.config.schema import Config, ModelConfig, RopeScalingConfig
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.errors import ConfigError, ConversionError
from megatron_asvr.hf import stock
from megatron_asvr.hf.export import export
from megatron_asvr.hf.importer import read_folder
from megatron_asvr.model import rope, sharding
from megatron_asvr.model.language import LanguageModel
from tests.language_cases import CASES, MIXTURES, hidden, one_rank, plain_batch
from tests.unit import hf_models

LENGTH = 40
LLAMA3 = RopeScalingConfig(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.5,
    high_freq_factor=3.0,
    original_max_position_embeddings=24,
)
YARN = RopeScalingConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
SHORT_YARN = replace(YARN, beta_fast=4.0, beta_slow=0.5, attention_factor=1.3)
LINEAR = RopeScalingConfig(rope_type="linear", factor=3.0)
SCALED = {
    "llama3": replace(CASES["llama"], rope_scaling=LLAMA3, rope_theta=500.0),
    "yarn": replace(CASES["qwen2"], rope_scaling=YARN),
    "short_yarn": replace(CASES["qwen3"], rope_scaling=SHORT_YARN),
    "linear": replace(CASES["mistral"], rope_scaling=LINEAR),
    "moe_yarn": replace(MIXTURES["qwen3_moe"], rope_scaling=YARN, sliding_window=9),
    "mixtral_window": replace(MIXTURES["mixtral"], sliding_window=6, tied_embeddings=True),
}
LANGUAGES = CASES | MIXTURES | SCALED
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture(scope="module")
def groups():
    with one_rank() as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "text.model"
    return TextTokenizer.train(hf_models.CORPUS * 9, path, vocab_size=310)


def random_model(language):
    """A stock model of other weights than its own initialisation: norms and biases differ too."""
    config = stock.text_config(language, IDS)
    config._attn_implementation = "eager"
    model = getattr(transformers, stock.TEXT_ARCHITECTURES[language.family])(config)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(hf_models.tensor_of(name, parameter.shape))
    return model.eval()


def tensors(folder):
    """All tensors of a folder's weights, by their names on disk."""
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


@torch.no_grad()
@pytest.mark.parametrize("case", LANGUAGES)
def test_logits_and_bytes_are_those_of_transformers(case, groups, tokenizer, tmp_path):
    language = replace(LANGUAGES[case], max_positions=256, vocab_size=331)
    theirs = random_model(language)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="40KB")
    source = read_folder(tmp_path / "in")
    assert source.kind == "text"
    source.check_fits(ModelConfig(language=language), ("language_model",))

    model = LanguageModel(source.language, groups=groups, dtype=torch.float32)
    sharding.load_weights(model, source, groups=groups, prefix="language_model.")
    tokens_BS = torch.randint(331, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    got_SBT = model.logits_full(hidden(model, tokens_BS, *plain_batch(tokens_BS)))
    wanted_BST = theirs(input_ids=tokens_BS, use_cache=False).logits
    assert wanted_BST.std() > 0.3
    torch.testing.assert_close(got_SBT.transpose(0, 1), wanted_BST, rtol=0, atol=1e-4)

    config = Config(model=ModelConfig(language=source.language))
    state = sharding.full_state(model, groups=groups, prefix="language_model.")
    out = export(state, config, tokenizer=tokenizer.path, out=tmp_path / "out", kind="text")
    before, after = tensors(tmp_path / "in"), tensors(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loader = "LlamaTokenizer" if language.family == "qwen2" else "AutoTokenizer"
    ids = getattr(transformers, loader).from_pretrained(out)("What is red?").input_ids
    assert ids == [tokenizer.bos_id, *tokenizer.encode("What is red?")]
    assert f"tokenizer = {loader}." in (out / "README.md").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert torch.equal(again(input_ids=tokens_BS, use_cache=False).logits, wanted_BST)


@pytest.mark.parametrize("scaling", [LLAMA3, YARN, SHORT_YARN, LINEAR])
@pytest.mark.parametrize("theta", [1e4, 5e5, 20.0])
def test_frequencies_are_those_of_transformers(scaling, theta):
    language = replace(CASES["qwen3"], rope_scaling=scaling, rope_theta=theta, head_dim=64)
    config = stock.text_config(language, IDS)
    module = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding(config)
    torch.testing.assert_close(rope.frequencies(language), module.inv_freq, rtol=1e-6, atol=0)
    scale = rope.softmax_scale(language) or 64**-0.5
    assert scale == pytest.approx(module.attention_scaling**2 / 8)
    assert (rope.softmax_scale(language) is None) == (scaling.rope_type != "yarn")


def rope_of(rope_parameters, **settings):
    """Our scaling of a llama with these parameters in its configuration file."""
    config = transformers.LlamaConfig(**settings, rope_parameters=rope_parameters)
    return stock.language_from(config, "here").rope_scaling


def test_old_and_rare_spellings_are_understood():
    old = transformers.LlamaConfig(rope_scaling={"type": "linear", "factor": 2.0})
    assert stock.language_from(old, "here").rope_scaling == replace(LINEAR, factor=2.0)
    found = rope_of({"rope_type": "yarn", "factor": 4.0}, max_position_embeddings=64)
    assert found == YARN
    given = {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0}
    config = transformers.LlamaConfig(rope_parameters=given)
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    assert rope_of(given).attention_factor == pytest.approx(module.attention_scaling)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "other than default, linear, llama3, yarn"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "only partial_rotary_factor=1.0"),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": False}, "only truncate=True"),
        ({"rope_type": "linear", "factor": 2.0, "wobble": 1}, r"unknown keys \['wobble'\]"),
    ],
)
def test_other_rotary_positions_are_refused(given, message):
    with pytest.raises(ConversionError, match=message):
        rope_of(given)


@pytest.mark.parametrize("setting", [{"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}])
def test_layers_without_experts_are_refused(setting):
    config = stock.text_config(MIXTURES["qwen3_moe"], IDS)
    for key, value in setting.items():
        setattr(config, key, value)
    with pytest.raises(ConversionError, match=next(iter(setting))):
        stock.language_from(config, "here")


def test_scaling_is_a_setting_of_a_run():
    config = override(Config(), ["model.language.rope_scaling={rope_type: llama3, factor: 8}"])
    assert from_dict(to_dict(config)) == config
    with pytest.raises(ConfigError, match="needs original_max_position_embeddings"):
        check(override(config, ["train.steps=1"]))
    wrong = "model.language.rope_scaling={rope_type: linear, beta_slow: 40}"
    with pytest.raises(ConfigError, match=r"beta_slow=40\.0 must be less than beta_fast"):
        check(override(Config(), ["train.steps=1", wrong]))
    with pytest.raises(ConfigError, match="'longrope' is not allowed"):
        override(Config(), ["model.language.rope_scaling.rope_type=longrope"])


SHAPE = {"hidden_act": "silu", "hidden_size": 64, "intermediate_size": 96, "vocab_size": 99}
SHAPE |= {"num_attention_heads": 4, "num_hidden_layers": 2, "rms_norm_eps": 1e-5}
PUBLISHED = {  # what published config.json files say beyond sizes, and what we read from it
    "vicuna": (
        {"model_type": "llama", "max_sequence_length": 4096, "num_key_value_heads": 4},
        {"rope_theta": 1e4, "tied_embeddings": False, "sliding_window": None},
    ),
    "llama31": (
        {
            "model_type": "llama",
            "attention_bias": False,
            "mlp_bias": False,
            "num_key_value_heads": 1,
            "rope_theta": 500000.0,
            "eos_token_id": [1, 2],
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        {
            "rope_theta": 5e5,
            "num_kv_heads": 1,
            "rope_scaling": RopeScalingConfig(
                rope_type="llama3", factor=8.0, original_max_position_embeddings=8192
            ),
        },
    ),
    "mistral_v1": (
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 4096},
        {"sliding_window": 4096},
    ),
    "mistral_v2": (
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
        {"sliding_window": None},
    ),
    "qwen25": (
        {
            "model_type": "qwen2",
            "max_window_layers": 28,
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
        },
        {
            "sliding_window": None,
            "tied_embeddings": True,
            "rope_scaling": replace(YARN, original_max_position_embeddings=32768),
        },
    ),
    "qwen3": (
        {
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 32,
            "max_window_layers": 36,
            "num_key_value_heads": 2,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "use_sliding_window": False,
        },
        {"head_dim": 32, "rope_theta": 1e6, "rope_scaling": RopeScalingConfig()},
    ),
    "qwen3_moe": (
        {
            "model_type": "qwen3_moe",
            "decoder_sparse_step": 1,
            "head_dim": 32,
            "mlp_only_layers": [],
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "num_key_value_heads": 2,
            "router_aux_loss_coef": 0.001,
        },
        {"num_experts": 8, "experts_per_token": 3, "expert_ffn": 24, "norm_topk_prob": True},
    ),
    "mixtral": (
        {
            "model_type": "mixtral",
            "num_experts_per_tok": 2,
            "num_key_value_heads": 2,
            "num_local_experts": 8,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
        },
        {"num_experts": 8, "expert_ffn": 96, "router_aux_loss_coef": 0.0, "rope_theta": 1e6},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_understood(name, tmp_path):
    given, wanted = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | given))
    found = stock.language_config_from_hf(tmp_path)
    assert found.family == given["model_type"]
    assert {key: getattr(found, key) for key in wanted} == wanted
