"""Tiny random models for the tests of megatron_asvr.hf."""

import sentencepiece
import torch

from megatron_asvr.config.schema import (
    Config,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
    VisualHeadConfig,
)
from megatron_asvr.hf import tables

VISION = VisionConfig(
    hidden_size=24, num_layers=3, num_heads=2, ffn_hidden_size=40, image_size=34, patch_size=8
)
HEAD = VisualHeadConfig(width=16, num_layers=2, num_heads=2)
HEAD_SIZES = tables.HeadSizes(codebook_sizes=(7, 5), code_width=12, with_codebooks=True)
LANGUAGES = {
    "llama": LanguageConfig(family="llama", num_kv_heads=2, rope_theta=5e5, norm_eps=1e-5),
    "mistral": LanguageConfig(family="mistral", num_kv_heads=1, sliding_window=9, head_dim=16),
    "qwen2": LanguageConfig(family="qwen2", num_kv_heads=2, tied_embeddings=True, rope_theta=1e6),
    "qwen3": LanguageConfig(family="qwen3", num_kv_heads=4, head_dim=16, sliding_window=11),
    "mixtral": LanguageConfig(
        family="mixtral", num_kv_heads=2, sliding_window=7, num_experts=3, experts_per_token=2
    ),
    "qwen3_moe": LanguageConfig(
        family="qwen3_moe",
        num_kv_heads=2,
        head_dim=12,
        tied_embeddings=True,
        num_experts=5,
        experts_per_token=3,
        expert_ffn_hidden_size=20,
        norm_topk_prob=False,
    ),
}
CORPUS = [
    "USER: What colour is the circle? ASSISTANT: It is red.",
    "USER: Is there a blue triangle? ASSISTANT: yes",
    "USER: How many shapes are there? ASSISTANT: There are no shapes, 0123456789.",
]


def language(family, vocab_size=400):
    """Small settings of ``family`` that differ from its defaults where it matters."""
    from dataclasses import replace

    return replace(
        LANGUAGES[family],
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        ffn_hidden_size=48,
        vocab_size=vocab_size,
        max_positions=256,
    )


def config(family="llama", **model):
    """A run with a tiny model."""
    return Config(
        model=ModelConfig(language=language(family), vision=VISION, visual_head=HEAD, **model)
    )


def tensor_of(name, shape):
    """Random numbers that depend on the name alone, of a size that keeps activations alive."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 31 * len(name))
    return torch.randn(shape, generator=generator) * 0.2 + (0.5 if "norm" in name else 0.0)


def state(cfg, head=True):
    """Our names and random tensors of the whole model."""
    rules = tables.llava_rules(cfg.model)
    if head:
        width = cfg.model.language.hidden_size
        rules = rules + tables.visual_head_rules(HEAD, width, HEAD_SIZES)
    return {rule.name: tensor_of(rule.name, rule.shape) for rule in rules}


def train_tokenizer(path, **options):
    """A SentencePiece model with ``<image>`` in ``path``."""
    settings = {
        "vocab_size": 340,
        "model_type": "bpe",
        "byte_fallback": True,
        "user_defined_symbols": ["<image>"],
        "pad_id": 3,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 20), model_writer=file, **(settings | options)
        )
    return path
