"""Splits of the layers, against every split of small models and a table of large ones."""

import dataclasses
import itertools
import random

import pytest

from megatron_asvr.config.load import load, override
from megatron_asvr.config.schema import LanguageConfig, VisualHeadConfig
from megatron_asvr.parallel.stages import (
    ItemCosts,
    Split,
    best_split,
    better_form,
    given_split,
    item_costs,
    layer_split,
)

FILES = [
    "model.text_tokenizer=t.model",
    "model.visual_tokenizer=tok",
    "data.train=[{path: a.json}]",
]
CODEBOOKS = (16384,) * 8
LARGE = {
    "vicuna-7b": LanguageConfig(),
    "vicuna-13b": LanguageConfig(
        hidden_size=5120, num_layers=40, num_heads=40, ffn_hidden_size=13824
    ),
    "qwen2.5-7b": LanguageConfig(
        family="qwen2",
        hidden_size=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        ffn_hidden_size=18944,
        vocab_size=152064,
    ),
    "llama3-70b": LanguageConfig(
        hidden_size=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        ffn_hidden_size=28672,
        vocab_size=128256,
    ),
}


def draws(number):
    """Random items, layers and pipelines, small enough for brute force."""
    rng = random.Random(0)
    for _ in range(number):
        pp, vpp = rng.choice([(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (2, 3)])
        scales = [rng.choice([0.0, 0.3, 1.0, 4.0, 20.0]) for _ in range(3)]
        encoder, text, visual = (scale * rng.uniform(0.5, 1.5) for scale in scales)
        items = ItemCosts(encoder=encoder, layer=1.0, text_head=text, visual_head=visual)
        yield items, rng.randint(max(1, pp * vpp - 2), 7), pp, vpp


def every_split(items, num_layers, pp, vpp, head_alone=False):
    """The largest stage cost of every split of one form."""
    chunks = pp * vpp
    for cuts in itertools.combinations_with_replacement(range(num_layers + 1), chunks - 1):
        layers = [b - a for a, b in itertools.pairwise([0, *cuts, num_layers])]
        if not (head_alone and layers[-1]):
            yield max(given_split(items, layers, pp=pp, head_alone=head_alone).costs)


def every_contiguous_split(items, num_layers, pp, vpp):
    """The largest stage cost of every way to cut the row of items into chunks, none empty."""
    row = [items.encoder, *[items.layer] * num_layers, items.text_head, items.visual_head]
    for cuts in itertools.combinations(range(1, len(row)), pp * vpp - 1):
        chunks = [sum(row[a:b]) for a, b in itertools.pairwise([0, *cuts, len(row)])]
        yield max(sum(chunks[stage::pp]) for stage in range(pp))


def test_best_split_is_the_best_of_its_form():
    for items, num_layers, pp, vpp in draws(300):
        for head_alone in (False, True)[: 1 + (pp > 1)]:
            split = best_split(items, num_layers, pp=pp, vpp=vpp, head_alone=head_alone)
            assert len(split.layers) == pp * vpp
            assert sum(split.layers) == num_layers
            assert min(split.layers) >= 0
            assert not head_alone or split.layers[-1] == 0
            best = min(every_split(items, num_layers, pp, vpp, head_alone))
            assert max(split.costs) <= best * (1 + 1e-9), (items, num_layers, pp, vpp, head_alone)


def test_the_better_form_is_within_a_twentieth_of_the_best_contiguous_split():
    forms = set()
    for items, num_layers, pp, vpp in draws(300):
        if pp == 1:
            continue
        split = better_form(items, num_layers, pp=pp, vpp=vpp)
        best = min(every_contiguous_split(items, num_layers, pp, vpp), default=float("inf"))
        assert max(split.costs) <= 1.05 * best, (items, num_layers, pp, vpp)
        forms.add(split.head_alone)
    assert forms == {False, True}


def test_the_first_and_the_last_stage_make_room_for_encoder_and_heads():
    items = ItemCosts(encoder=2.0, layer=1.0, text_head=0.5, visual_head=3.5)
    split = best_split(items, 14, pp=4)
    assert split.layers == (3, 5, 5, 1)
    assert split.costs == (5.0, 5.0, 5.0, 5.0)
    assert split.imbalance == 1.0


def test_chunks_of_a_stage_are_level():
    items = ItemCosts(encoder=2.0, layer=1.0, text_head=0.5, visual_head=1.5)
    # stage 0: encoder + 1, 3; stage 1: 3, 1 + heads
    assert best_split(items, 8, pp=2, vpp=2).layers == (1, 3, 3, 1)


def test_the_visual_head_alone_leaves_its_stage_no_layers():
    items = ItemCosts(encoder=0.0, layer=1.0, text_head=1.0, visual_head=4.0)
    split = best_split(items, 7, pp=3, head_alone=True)
    assert (split.layers, split.costs) == ((4, 3, 0), (4.0, 4.0, 4.0))
    assert max(best_split(items, 7, pp=3).costs) == 5.0


def passes_of_1f1b(stage, stages, number):
    """What a stage does, in order: a forward pass of micro-batch k is (k, 0), backward (k, 1)."""
    ahead = min(stages - 1 - stage, number)
    yield from ((k, 0) for k in range(ahead))
    for k in range(number):
        if k + ahead < number:
            yield k + ahead, 0
        yield k, 1


def time_of_1f1b(costs, number):
    """When the last backward pass ends; a forward pass is a third of a stage's cost."""
    ended, clocks = {}, [0.0] * len(costs)
    waiting = [list(passes_of_1f1b(stage, len(costs), number)) for stage in range(len(costs))]
    while any(waiting):
        for stage, left in enumerate(waiting):
            while left:
                k, back = left[0]
                first = stage == (len(costs) - 1 if back else 0)
                needed = (k, 0, stage) if first else (k, back, stage + (1 if back else -1))
                if needed not in ended and not (first and not back):
                    break
                start = max(clocks[stage], ended.get(needed, 0.0))
                clocks[stage] = ended[k, back, stage] = start + costs[stage] * (1 + back) / 3
                left.pop(0)
    return max(clocks)


def test_the_bubble_is_that_of_the_schedule_and_of_uneven_stages():
    rng = random.Random(1)
    for stages, number in itertools.product((2, 4, 8), (8, 32)):
        equal = Split(layers=(), costs=(1.0,) * stages)
        assert equal.idle(number) == pytest.approx((stages - 1) / (number + stages - 1))
        assert equal.idle(number, 2) < equal.idle(number)
        for _ in range(20):
            split = Split(layers=(), costs=tuple(rng.uniform(1, 1.1) for _ in range(stages)))
            time = time_of_1f1b(split.costs, number)
            idle = 1 - number * sum(split.costs) / stages / time
            assert split.idle(number) == pytest.approx(idle, abs=0.02)  # measured 0.016
            assert split.idle(number) > 1 - 1 / split.imbalance


def run(preset, *overrides, language=None):
    config = load(preset, [*FILES, *overrides])
    if language is None:
        return config
    model = dataclasses.replace(config.model, language=language)
    return dataclasses.replace(config, model=model)


@pytest.mark.parametrize("preset", ["vicuna7b_stage1", "vicuna7b_stage2"])
@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("tp", [1, 8])
def test_large_models_come_within_a_twentieth_of_the_best_split(preset, name, tp):
    lm = LARGE[name]
    items = item_costs(run(preset, f"parallel.tp={tp}", language=lm), CODEBOOKS)
    for pp, vpp in itertools.product((2, 4, 8), (1, 2)):
        forms = (
            best_split(items, lm.num_layers, pp=pp, vpp=vpp, head_alone=x) for x in (False, True)
        )
        best = min(max(form.costs) for form in forms)
        got = better_form(items, lm.num_layers, pp=pp, vpp=vpp)
        assert max(got.costs) <= 1.05 * best, (pp, vpp)


def test_the_visual_head_is_alone_where_that_is_cheaper_and_possible():
    def split(*settings, tied=False):
        lm = dataclasses.replace(LARGE["qwen2.5-7b"], tied_embeddings=tied)
        config = run("vicuna7b_stage1", "parallel={tp: 1, pp: 8}", *settings, language=lm)
        return layer_split(config, CODEBOOKS)

    chosen, together = split(), split("parallel.head_alone=false")
    assert (chosen.head_alone, together.head_alone) == (True, False)
    assert chosen.layers[-1] == 0
    assert max(together.costs) > 1.05 * max(chosen.costs)
    assert split(tied=True).head_alone
    assert not split("parallel={tp: 1, pp: 2, vpp: 2}", tied=True).head_alone


def test_a_form_that_is_asked_for_wins():
    asked = run("vicuna7b_stage2", "parallel={pp: 2, head_alone: true}")
    assert layer_split(asked, CODEBOOKS).layers == (32, 0)
    for alone in (True, None):
        form = "" if alone is None else ", head_alone: true"
        config = run("vicuna7b_stage2", f"parallel={{pp: 4, stages: [10, 11, 11, 0]{form}}}")
        given = layer_split(config, CODEBOOKS)
        assert (given.layers, given.head_alone) == ((10, 11, 11, 0), bool(alone))


def test_given_stages_win():
    config = run("vicuna7b_stage2", "parallel={pp: 2, stages: [0, 32]}")
    split = layer_split(config, CODEBOOKS)
    assert split.layers == (0, 32)
    assert split.costs[0] == item_costs(config, CODEBOOKS).encoder


def test_costs_count_what_is_computed():
    config = run("vicuna7b_stage2", "parallel.tp=1")
    items = item_costs(config, CODEBOOKS)
    positions, width, ffn = 729 + 256, 4096, 11008
    # three times the forward pass of the linears and of half the attention matrix
    linear = 2 * positions * (4 * width * width + 3 * width * ffn)
    assert items.layer == 3 * (linear + 2 * positions * (positions + 1) * width)
    assert items.text_head == 3 * 2 * 128 * width * 32000
    frozen = override(config, ["train.trainable=[visual_head]"])
    only_forward = item_costs(frozen, CODEBOOKS)
    assert only_forward.layer == items.layer / 3
    no_hidden_gradient = 2 * 729 * width * VisualHeadConfig().width
    assert only_forward.visual_head == items.visual_head - no_hidden_gradient
    projector = override(config, ["train.trainable=[projector]"])
    assert item_costs(projector, CODEBOOKS).text_head == items.text_head * 2 / 3
    assert item_costs(config, ()).visual_head == 0


@pytest.mark.parametrize(
    ("setting", "item", "low", "high"),
    [
        ("train.recompute=full", "layer", 4 / 3, 4 / 3),
        ("train.recompute=selective", "layer", 1.001, 1.1),
        ("train.recompute_visual_head=true", "visual_head", 1.15, 4 / 3),
        ("data.codes=online", "visual_head", 1.1, 1.3),
        ("data.max_length=729", "text_head", 0, 0),
    ],
)
def test_settings_that_change_the_cost_of_one_item(setting, item, low, high):
    config = run("vicuna7b_stage2", "parallel.tp=1")
    before = dataclasses.asdict(item_costs(config, CODEBOOKS))
    after = dataclasses.asdict(item_costs(override(config, [setting]), CODEBOOKS))
    assert low - 1e-9 <= after[item] / before[item] <= high + 1e-9
    if "max_length" not in setting:
        assert [name for name in after if after[name] != before[name]] == [item]


def test_images_are_encoded_whole():
    def encoder(*settings):
        whole = item_costs(run("vicuna7b_stage2", *settings), ()).encoder
        projector = run("vicuna7b_stage2", *settings, "model.vision.feature_layer=0")
        return whole - item_costs(projector, ()).encoder

    for settings, factor in (
        (["parallel.tp=8"], 8),
        (["parallel.tp=8", "train.micro_batch=8"], 1),
        (["parallel={tp: 2, cp: 2}", "train.micro_batch=3"], 4 / 3),
        (["parallel.tp=4", "data={packing: true, pack_length: 2048}"], 2),  # two images a row
    ):
        got = encoder(*settings) / encoder("parallel.tp=1")
        assert got == pytest.approx(factor), settings


def test_a_mixture_costs_its_chosen_experts():
    dense = LanguageConfig(num_kv_heads=8, ffn_hidden_size=2 * 14336)
    mixture = LanguageConfig(
        family="mixtral", num_kv_heads=8, ffn_hidden_size=14336, num_experts=8, experts_per_token=2
    )
    costs = [item_costs(run("vicuna7b_stage2", language=x), ()).layer for x in (dense, mixture)]
    assert costs[1] == pytest.approx(costs[0], rel=1e-3)  # the router beside it


def test_the_visual_head_costs_two_operations_a_weight_and_patch():
    """Against the published size: 724 M parameters, of which a depth uses its own MLP and head."""
    config = run("vicuna7b_stage2", "train.trainable=[]")
    e, depth = VisualHeadConfig().width, 8
    weights = 3 * (4 * depth + 4 * depth) * e * e + depth * 16384 * e
    weights += 4096 * e + e * e + 7 * 1152 * e
    got = item_costs(config, CODEBOOKS).visual_head
    assert got == pytest.approx(2 * 729 * weights, rel=0.001)  # attention over depths is tiny
