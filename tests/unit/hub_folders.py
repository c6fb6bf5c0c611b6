"""Tokenizer folders of Hugging Face, trained on this repository's texts, as three families have."""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = """{% for message in messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>

' + message['content'] | trim + '<|eot_id|>' %}
    {%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}
"""
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "smollm2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "marked": ["<unk>", "<s>", "</s>"],
}
SETTINGS = {
    "llama3": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": LLAMA3,
        "clean_up_tokenization_spaces": True,
    },
    "qwen2": {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": QWEN2,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    },
    "smollm2": {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "chat_template": QWEN2,
    },
    "marked": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": False},
        "unk_token": "<unk>",
    },
}
FAMILIES = tuple(SETTINGS)


def texts():
    """This repository's own prose and code."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), Path(__file__)]
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines(True)]


def write(family, folder, **settings):
    """A folder with ``tokenizer.json`` and its settings, as ``family`` has them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(byte_fallback=family == "marked", fuse_unk=False))
    alphabet = [] if family == "marked" else pre.ByteLevel.alphabet()
    if family == "marked":
        tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    elif family == "smollm2":
        digits = pre.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre.Sequence([digits, pre.ByteLevel(add_prefix_space=False)])
    else:
        words = Regex(WORDS % ("{1,3}" if family == "llama3" else ""))
        level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre.Sequence([pre.Split(words, "isolated"), level])
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if family != "marked":
        tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(x, normalized=False, special=True) for x in SPECIAL[family]]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=alphabet,
        special_tokens=special if family in ("smollm2", "marked") else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens(special)
    if family in ("llama3", "marked"):
        begin = SETTINGS[family]["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.dumps(SETTINGS[family] | settings)
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    return folder
