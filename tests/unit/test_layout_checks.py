"""Layouts that cannot work are refused with every problem at once and what would work."""

import pytest

from megatron_asvr.config.check import check
from megatron_asvr.config.load import load
from megatron_asvr.errors import ConfigError
from megatron_asvr.precision import check_attention

BASE = [
    "model.text_tokenizer=t.model",
    "model.visual_tokenizer=tok",
    "data.train=[{path: a.json}]",
    "train.steps=10",
]
MIXTURE = "model.language={family: mixtral, num_experts: 8}"
ALONE = "parallel={pp: 2, head_alone: true}"
PACKED = "data={packing: true, train: [{path: a.json}]}"


def refused(world, *overrides):
    with pytest.raises(ConfigError) as err:
        check(load(None, [*BASE, *overrides]), world)
    return str(err.value)


@pytest.mark.parametrize(
    ("world", "overrides", "words"),
    [
        (None, ["parallel.tp=0"], ["parallel.tp=0", "at least 1"]),
        (None, ["parallel.cp=-1"], ["parallel.cp=-1", "at least 1"]),
        (None, ["parallel={pp: 2, vpp: 1}"], ["parallel.vpp=1", "at least 2"]),
        (None, ["parallel.vpp=2"], ["parallel.vpp=2", "parallel.pp >= 2", "got 1"]),
        (None, ["parallel={pp: 8, vpp: 8}"], ["pp=8 x vpp=8", "64 chunks", "at most 32"]),
        (None, ["parallel={pp: 2, stages: [32]}"], ["[32]", "need 2 numbers"]),
        (None, ["parallel={pp: 2, stages: [16, 15]}"], ["sum 31", "with the sum 32"]),
        (None, ["parallel={pp: 2, stages: [33, -1]}"], ["[33, -1]", "none negative"]),
        (None, ["parallel.head_alone=true"], ["head_alone=true", "parallel.pp >= 2, got 1"]),
        (
            None,
            [ALONE, "loss.visual_weight=0", "train.trainable=[projector]"],
            ["head_alone=true", "visual_weight=0 has none"],
        ),
        (
            None,
            ["parallel={pp: 2, vpp: 2, head_alone: true}", "model.language.tied_embeddings=true"],
            ["tied_embeddings=true", "parallel.pp >= 3 or no parallel.vpp"],
        ),
        (None, [ALONE, "parallel.stages=[31, 1]"], ["[31, 1]", "must end with 0"]),
        (None, ["parallel.stages=[]"], ["0 numbers", "need 1 numbers"]),
        (None, ["parallel.tp=3"], ["tp=3", "num_heads=32", "width=2048", "1, 2, 4, 8, 16, 32"]),
        (None, ["parallel.sp=true"], ["parallel.sp", "tp > 1"]),
        (None, ["parallel.ep=2"], ["parallel.ep=2", "family=llama has none", "ep=1"]),
        (None, ["parallel.ep=3", MIXTURE], ["ep=3", "num_experts=8", "1, 2, 4, 8"]),
        (None, ["parallel.tp=2", MIXTURE], ["tp=2 with experts", "parallel.sp=true"]),
        (None, [PACKED, "data.pack_length=1024"], ["pack_length=1024", "max_length=2048"]),
        (
            None,
            [PACKED, "data.pack_length=2052", "parallel={cp: 2, tp: 2, sp: true}"],
            ["pack_length=2052", "2 x cp x tp = 8", "2056 or 2048"],
        ),
        (None, ["loss.mode=official", "parallel.pp=2"], ["parallel.pp must be 1, got 2"]),
        (None, ["loss.mode=official", "parallel.cp=2"], ["parallel.cp must be 1, got 2"]),
        (None, ["loss.mode=official", PACKED], ["data.packing must be false, got true"]),
        (2, ["loss.mode=official"], ["one data-parallel rank", "got 2"]),
        (3, ["parallel.tp=2"], ["multiple of 2 ranks, got 3", "2, 4, 6"]),
        (0, [], ["multiple of 1 ranks, got 0"]),
        (3, [], ["global_batch=256", "multiple of 3"]),
        (2, ["parallel.ep=4", MIXTURE], ["ep=4", "2 ranks of a pipeline stage", "1, 2"]),
    ],
)
def test_one_problem_is_one_line(world, overrides, words):
    message = refused(world, *overrides)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_length_that_is_offered_holds_every_sample():
    lengths = ["data.pack_length=2051", "data.max_length=2049"]
    assert refused(None, PACKED, *lengths, "parallel.cp=2").endswith("= 4; use 2052")


def test_all_problems_are_listed_at_once():
    message = refused(
        6,
        "parallel={tp: 4, pp: 40, cp: 2, sp: false, ep: 3}",
        "model.language={family: qwen3_moe, num_experts: 8, num_heads: 30, head_dim: 64}",
        "loss.mode=official",
    )
    first, *problems = message.split("\n")
    assert first == "the layout has 7 problems:"
    for words in (
        "parallel.pp=40 makes 40 chunks",
        "parallel.tp=4 does not divide model.language.num_heads=30, model.language.num_kv_heads=30",
        "parallel.ep=3 does not divide",
        "set parallel.sp=true",
        "parallel.pp must be 1",
        "parallel.cp must be 1",
        "multiple of 320 ranks, got 6",
    ):
        assert sum(words in problem for problem in problems) == 1, message


def test_an_impossible_degree_hides_no_other_problem():
    message = refused(4, "parallel={tp: 0, pp: 40, vpp: 1, ep: 2}")
    assert "4 problems" in message
    for words in ("tp=0 must be", "vpp=1 must be", "40 chunks", "ep=2"):
        assert words in message, message


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (8, ["parallel={tp: 2, pp: 2, cp: 2, sp: true}"]),
        (4, ["parallel={pp: 2, vpp: 2, stages: [0, 10, 12, 10]}"]),
        (4, ["parallel={tp: 2, ep: 4, sp: true}", MIXTURE]),
        (3, [PACKED]),  # packed sequences are handed out one by one
        (1, [PACKED, "data.pack_length=4096"]),
        (3, [PACKED, "parallel.cp=3"]),  # 2048 is padded
        (2, ["parallel={cp: 2}", "data.max_length=2047"]),  # rows are padded
        (2, ["parallel={tp: 2}", "loss.visual_weight=0", "model.visual_head={width: 3}"]),
    ],
)
def test_possible_layouts_pass(world, overrides):
    trainable = "train.trainable=[projector, language_model]"
    config = load(None, [*BASE, trainable, *overrides])
    assert check(config, world) == config


def test_a_sliding_window_under_context_parallelism_needs_the_dense_attention():
    config = load(None, ["parallel.cp=2", "model.language.sliding_window=64"])
    check_attention(config, "local")
    with pytest.raises(ConfigError, match=r"parallel.cp=2 with .*sliding_window=64.*use cp=1"):
        check_attention(config, "te")
    check_attention(load(None, ["parallel.cp=2"]), "te")
