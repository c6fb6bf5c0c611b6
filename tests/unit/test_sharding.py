"""Full weights in, the same full weights out; initialisation by name; errors that name weights."""

import dataclasses

import pytest
import torch

from megatron_asvr.errors import CheckpointError
from megatron_asvr.model import sharding
from megatron_asvr.model.language import LanguageModel
from megatron_asvr.parallel.plan import ParallelPlan
from tests.language_cases import CASES, SMALL, build, one_rank

PREFIX = "language_model."


@pytest.fixture(scope="module")
def groups():
    with one_rank() as made:
        yield made


def empty(config, groups) -> LanguageModel:
    return LanguageModel(config, groups=groups, dtype=torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_full_state_is_the_inverse_of_load_weights(case, groups):
    source = dict(sharding.full_state(build(CASES[case], groups), groups=groups, prefix=PREFIX))
    assert source[f"{PREFIX}embedding.word_embeddings.weight"].shape == (301, 32)
    assert (f"{PREFIX}output_layer.weight" in source) != CASES[case].tied_embeddings
    copy = empty(CASES[case], groups)
    assert sharding.load_weights(copy, source.get, groups=groups, prefix=PREFIX) == []
    again = dict(sharding.full_state(copy, groups=groups, prefix=PREFIX))
    assert list(again) == list(source)
    assert all(torch.equal(again[name], source[name]) for name in source)
    assert (copy.embedding.word_embeddings.weight[301:] == 0).all()


def test_shards_of_halves_padding_and_columns(groups):
    """What rank 1 of 2 holds of a gated linear, a padded vocabulary and a row-split matrix."""
    rank_1 = dataclasses.replace(groups, plan=ParallelPlan(tp=2, world=2), tp_rank=1)
    gate_up = torch.arange(8.0)[:, None].expand(8, 3)
    part = torch.nn.Module()
    part.fc1 = sharding.mark(torch.nn.Parameter(torch.empty(4, 3)), dim=0, blocks=2)
    part.table = sharding.mark(torch.nn.Parameter(torch.empty(3, 2)), dim=0, full_size=5)
    part.out = sharding.mark(torch.nn.Parameter(torch.empty(2, 2)), dim=1)
    full = {"fc1": gate_up, "table": torch.arange(1.0, 11).view(5, 2), "out": torch.eye(2, 4)}
    assert sharding.full_shape(part.table, groups=rank_1) == (5, 2)
    sharding.load_weights(part, full.get, groups=rank_1)
    assert part.fc1[:, 0].tolist() == [2, 3, 6, 7]
    assert part.table.tolist() == [[7, 8], [9, 10], [0, 0]]
    assert part.out.tolist() == [[0, 0], [0, 0]]
    full["out"] = torch.arange(8.0).view(2, 4)
    sharding.load_weights(part, full.get, groups=rank_1)
    assert part.out.tolist() == [[2, 3], [6, 7]]


def test_marks_are_what_megatron_core_reads(groups):
    model = empty(SMALL, groups)
    marks = {
        name: parameter.partition_dim
        for name, parameter in model.named_parameters()
        if getattr(parameter, "tensor_model_parallel", False)
    }
    layer = "decoder.layers.1."
    assert marks[f"{layer}self_attention.linear_qkv.weight"] == 0
    assert marks[f"{layer}self_attention.linear_proj.weight"] == 1
    assert marks[f"{layer}mlp.linear_fc1.weight"] == 0
    assert marks[f"{layer}mlp.linear_fc2.weight"] == 1
    assert marks["embedding.word_embeddings.weight"] == 0
    assert marks["output_layer.weight"] == 0
    assert not any("norm" in name for name in marks)


def test_initialisation_depends_on_seed_and_name_only(groups):
    first, same, other = (empty(SMALL, groups) for _ in range(3))
    for model, seed in ((first, 1), (same, 1), (other, 2)):
        sharding.seeded_init(model, seed, groups=groups, std=model.init_std, prefix=PREFIX)
    for (name, a), b, c in zip(
        first.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == (a.dim() == 1), name
    layers = first.decoder.layers
    assert not torch.equal(layers[0].mlp.linear_fc1.weight, layers[1].mlp.linear_fc1.weight)


def test_initialisation_has_the_right_spread(groups):
    model = empty(dataclasses.replace(CASES["qwen2"], num_layers=8), groups)
    sharding.seeded_init(model, 0, groups=groups, std=model.init_std, prefix=PREFIX)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        elif parameter.dim() == 1:
            assert (parameter == 1).all()
        else:
            scaled = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            wanted = 0.2 / 4 if scaled else 0.2  # sqrt(2 * 8 layers) = 4
            drawn = parameter[:301] if "embeddings" in name else parameter
            assert abs(drawn.std() / wanted - 1) < 0.08, name  # 4 sigma of the smallest, 1024
    constant = empty(SMALL, groups)
    sharding.seeded_init(constant, 0, groups=groups, std=0.5)
    assert abs(constant.decoder.layers[0].mlp.linear_fc2.weight.std() / 0.5 - 1) < 0.1


def test_errors_name_the_weights(groups):
    model = empty(SMALL, groups)
    source = dict(sharding.full_state(build(SMALL, groups), groups=groups))
    missing = "decoder.layers.1.mlp.linear_fc2.weight"
    without = {name: x for name, x in source.items() if name != missing}
    with pytest.raises(CheckpointError, match=rf"1 of 15 weights are missing: {missing}"):
        sharding.load_weights(model, without.get, groups=groups)
    assert sharding.load_weights(model, without.get, groups=groups, strict=False) == [missing]
    wrong = source | {missing: torch.zeros(32, 47)}
    with pytest.raises(
        CheckpointError, match=r"linear_fc2.weight has shape \(32, 47\).*\(32, 48\)"
    ):
        sharding.load_weights(model, wrong.get, groups=groups)
    unfit = source | {"output_layer.weight": torch.zeros(300, 32)}
    with pytest.raises(CheckpointError, match=r"\(301, 32\)"):
        sharding.load_weights(model, unfit.get, groups=groups)
