"""Real models at their real sizes, without memory, in the layouts of the shipped recipes."""

import subprocess
import sys

import pytest
import torch
import transformers

from megatron_asvr.config.check import check
from megatron_asvr.config.load import load
from megatron_asvr.config.schema import Config
from megatron_asvr.model.language import padded_vocab_size
from megatron_asvr.model.tokenizer import TokenizerConfig
from megatron_asvr.planner.memory import plan_memory
from megatron_asvr.planner.parameters import count_parameters, left_out
from megatron_asvr.planner.rehearsal import largest
from megatron_asvr.planner.shards import Shard, stages, whole
from megatron_asvr.planner.state import state
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
    held = total(found, "vision_encoder.")
    assert count(vision) == held + left_out(run.model.vision)


RECIPES = {  # of the layout, and its ranks
    "vicuna-7b": ("slurm/llava_7b/stage2.yaml", 8),
    "vicuna-13b": ("slurm/llava_13b/stage2.yaml", 16),
    "llama-3-70b": ("slurm/llama3_70b/stage2.yaml", 64),
    "qwen2.5-7b": ("slurm/llava_7b/stage2.yaml", 8),
    "qwen2.5-72b": ("slurm/llama3_70b/stage2.yaml", 64),
}
WORLDS = (8, 16, 32, 64, 128, 256, 512)
PAPER = (16384,) * 8
VOCABULARIES = ("word_embeddings.weight", "output_layer.weight")


def recipe(name: str) -> tuple[Config, int, TokenizerConfig]:
    """A recipe with another model, its ranks, and the tokenizer of the paper."""
    family, sizes, _ = MODELS[name]
    file, world = RECIPES[name]
    words = [f"model.language.{key}={value}" for key, value in ours(sizes).items()]
    words += [f"model.language.family={family}", "train.micro_batch=1"]
    if "num_key_value_heads" not in sizes:
        words.append("model.language.num_kv_heads=null")
    run = check(load(file, words), world)
    assert run.model.visual_head.width == 2048
    codes = TokenizerConfig(
        kind="semantic", vision=run.model.vision, feature_layer=-2, codebook_sizes=PAPER
    )
    return run, world, codes


@pytest.mark.parametrize("name", MODELS)
def test_the_bytes_of_all_ranks_are_those_of_the_whole_model(name):
    run, world, codes = recipe(name)
    p = run.parallel
    first, last = (stages(run, world, codes, tp_rank=rank) for rank in (0, p.tp - 1))
    assert first == last  # so all ranks of a tensor-parallel group hold as much
    found = whole(first, run)
    assert total(found, "language_model.") == MODELS[name][2]
    counts = count_parameters(run.model, PAPER, codes.width)
    assert sum(found.values()) == sum(counts.values()) - left_out(run.model.vision)
    for chunks in first:
        for shard in (shard for chunk in chunks for shard in chunk.shards):
            assert shard.numbers == shard.full or p.tp * shard.numbers == padded(shard, run)
        trained = state(chunks, run, world).trained
        for ranks in (ranks for ranks in WORLDS if ranks % (p.tp * p.pp) == 0):
            copies = range(ranks // (p.tp * p.pp))
            shares = [state(chunks, run, ranks, replica=copy).optimizer for copy in copies]
            assert sum(shares) == 12 * trained  # an fp32 weight and two moments


def padded(shard: Shard, run: Config) -> int:
    """Elements of the whole parameter with what a vocabulary is padded by."""
    if not shard.name.endswith(VOCABULARIES):
        return shard.full
    lm = run.model.language
    return padded_vocab_size(lm.vocab_size, run.parallel.tp) * lm.hidden_size


@pytest.mark.parametrize("name", MODELS)
def test_every_stage_goes_forward_and_back_at_its_real_size(name):
    run, world, codes = recipe(name)
    for rank in plan_memory(run, world, codes):
        least = rank.in_flight * rank.layers * layer_bytes(run)
        if 0 < rank.stage < run.parallel.pp - 1:
            assert rank.kept == pytest.approx(least, rel=0.01)  # and what was received
        else:
            assert least < rank.kept < 1.5 * least  # and encoder, projector, heads


def layer_bytes(run: Config) -> int:
    """Of a layer under selective recomputation, counted by hand as in arXiv 2205.05198, section 4.

    Two norms' and two linears' inputs, cosine and sine of queries and keys, the packed projection,
    rotated queries and keys, what attention gives, and five tensors of the gated part.
    """
    lm, tp, shape = run.model.language, run.parallel.tp, largest(run)
    assert run.train.recompute == "selective"
    positions = shape.rows * shape.length
    own = positions // tp if run.parallel.sp else positions
    queries, keys = (n * lm.width_per_head // tp for n in (lm.num_heads, lm.kv_heads))
    norms = own * (4 * 2 * lm.hidden_size + 8)
    attention = 2 * positions * (4 * lm.width_per_head + 3 * queries + 3 * keys)
    return norms + attention + 2 * positions * 5 * lm.ffn_hidden_size // tp


def test_a_stage_has_all_its_tensors_on_one_device():
    """See ``fake_gpu``."""
    command = [sys.executable, "-m", "tests.fake_gpu", "slurm/llama3_70b/stage2.yaml", "64"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.stdout.count("all on gpu:0") == 4, ran.stderr[-3000:]


def ours(sizes: dict[str, int]) -> dict[str, int]:
    return {OURS.get(name, name): size for name, size in sizes.items()}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def total(found: dict[str, int], prefix: str) -> int:
    return sum(number for name, number in found.items() if name.startswith(prefix))
