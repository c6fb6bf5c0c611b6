"""Real models at their real sizes, without memory: ours holds as many numbers as Hugging Face's."""

import pytest
import torch
import transformers

from megatron_asvr.planner.shards import stages, whole
from tests.run_cases import config

VICUNA = {"vocab_size": 32000, "num_attention_heads": 32, "num_hidden_layers": 32}
# As in the models' public config.json, and their published numbers of parameters.
MODELS = {
    "vicuna-7b": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 11008, **VICUNA},
        6_738_415_616,
    ),
    "vicuna-13b": (
        "llama",
        {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "vocab_size": 32000,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
        },
        13_015_864_320,
    ),
    "llama-3-70b": (
        "llama",
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "vocab_size": 128256,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "num_hidden_layers": 80,
        },
        70_553_706_496,
    ),
    "qwen2.5-7b": (
        "qwen2",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "vocab_size": 152064,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "num_hidden_layers": 28,
        },
        7_615_616_512,
    ),
    "qwen2.5-72b": (
        "qwen2",
        {
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "vocab_size": 152064,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "num_hidden_layers": 80,
        },
        72_706_203_648,
    ),
}
OURS = {
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_hidden_size",
}
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


@pytest.mark.parametrize("name", MODELS)
def test_counts_equal_hugging_face_s(name):
    family, sizes, published = MODELS[name]
    with torch.device("meta"):
        settings = transformers.AutoConfig.for_model(family, **sizes, tie_word_embeddings=False)
        theirs = transformers.AutoModelForCausalLM.from_config(settings)
        vision = transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(**SO400M, vision_use_head=False)
        )
    run = config(
        model={
            "language": {"family": family, **ours(sizes)},
            "vision": ours(SO400M),
        },
        loss__visual_weight=0.0,
        train__precision="bf16",
    )
    found = whole(stages(run, 1, None), run)
    assert count(theirs) == published == total(found, "language_model.")
    assert count(vision) == total(found, "vision_encoder.")


def ours(sizes: dict[str, int]) -> dict[str, int]:
    return {OURS.get(name, name): size for name, size in sizes.items()}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def total(found: dict[str, int], prefix: str) -> int:
    return sum(number for name, number in found.items() if name.startswith(prefix))
