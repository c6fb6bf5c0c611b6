"""Products in 8 bits in the model: which linears, what a checkpoint keeps, what changes nothing."""

import dataclasses
from pathlib import Path

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch

from megatron_asvr.checkpoint.load import find_resume
from megatron_asvr.checkpoint.state import parts
from megatron_asvr.config.check import check
from megatron_asvr.config.load import load
from megatron_asvr.config.schema import Config, Fp8Config
from megatron_asvr.errors import ConfigError
from megatron_asvr.model.linears import linears, precision_lines
from megatron_asvr.model.sharding import named
from megatron_asvr.parallel.plan import make_plan
from megatron_asvr.precision.fp8.emulator import STATE
from megatron_asvr.precision.fp8.policy import decide, describe
from megatron_asvr.train.inference import _plain
from megatron_asvr.train.start import _announce_changes
from megatron_asvr.train.step import AnomalyError, train_step
from tests.fp8_cases import HEADS, RECIPES, run_of
from tests.language_cases import one_rank
from tests.run_cases import CODEBOOK_SIZES, IDENTITY, Bench, folder, save, step_batches

ROOT = Path(__file__).resolve().parents[2]
MIXTURE = {
    "model__language__family": "mixtral",
    "model__language__num_experts": 2,
    "model__language__num_layers": 1,
}
TIED = {"model__language__tied_embeddings": True, "model__language__family": "qwen2"}


@pytest.mark.parametrize("changes", [{}, MIXTURE, TIED], ids=["dense", "mixture", "tied"])
def test_the_list_of_linears_is_that_of_the_built_model(changes: dict[str, object]) -> None:
    listed = linears(run_of("current", exclude=(), **changes), CODEBOOK_SIZES)
    fits = [x for x in listed if not x.name.startswith("visual_head.heads")]
    with one_rank() as groups:
        bench = Bench(run_of("current", **changes), groups)
        products = bench.model.watched.products
        assert sorted(products) == sorted(x.name for x in fits)
        weights = {n.removesuffix(".weight"): p for n, p in named(bench.chunks)}
        for x in listed:
            owner, _, depth = x.name.rpartition(".")
            weight = weights.get(x.name)
            if weight is None and depth.isdigit():  # one of the matrices of all depths
                weight = weights[owner][int(depth)]
            if weight is None:  # tied
                weight = weights["language_model.embedding.word_embeddings"]
            assert weight.flatten(0, -2).shape == (x.outputs, x.inputs), x.name


def test_patterns_name_linears_and_layers_from_either_end() -> None:
    run = run_of("block", exclude=())
    listed = linears(run, CODEBOOK_SIZES)
    patterns = ("*.layers.-1.mlp.*", "language_model.decoder.layers.0.*", *HEADS)
    decided = decide(listed, Fp8Config(recipe="block", exclude=patterns))
    layer = "language_model.decoder.layers"
    assert decided[f"{layer}.1.mlp.linear_fc1"] == "*.layers.-1.mlp.*"
    assert decided[f"{layer}.1.self_attention.linear_qkv"] is None
    assert decided[f"{layer}.0.self_attention.linear_qkv"] == f"{layer}.0.*"
    assert decided["visual_head.layers.0.mlp.w1.2"] == "*.layers.-1.mlp.*"
    lines = describe(listed, decided, "bf16")
    assert "language_model.output_layer: 256 -> 256 a rank, fp8" in lines
    assert f"{layer}.1.self_attention.linear_qkv: 256 -> 768 a rank, fp8" in lines
    assert any(line.startswith("visual_head.heads.0: 256 -> 7 a rank, bf16 (") for line in lines)


def test_a_pattern_that_fits_nothing_is_refused_with_the_nearest_name() -> None:
    listed = linears(run_of("current"), CODEBOOK_SIZES)
    with pytest.raises(ConfigError, match=r"fits no linear.*nearest: projector\.linear_1"):
        decide(listed, Fp8Config(recipe="current", exclude=("projector.linear1",)))
    none = decide(listed, Fp8Config(recipe="none", exclude=("projector.linear1",)))
    assert set(none.values()) == {"precision.fp8.recipe=none"}


def test_the_official_recipe_on_8_gpus_is_listed_linear_by_linear() -> None:
    recipe, sizes = ROOT / "slurm/llava_7b/stage2.yaml", (4096,) * 8
    ends = '["language_model.decoder.layers.0.*", "language_model.decoder.layers.-1.*"]'
    settings = ["precision.fp8.recipe=block", f"precision.fp8.exclude={ends}"]
    run = load(str(recipe), settings)
    check(run, 8)
    plan = make_plan(run, 8, sizes)
    assert (plan.tp, plan.sp, plan.dp) == (2, True, 4)
    lines = precision_lines(run, sizes)
    assert "bf16, and fp8 (block scaling, hybrid, Transformer Engine)" in lines[0]
    layer = "language_model.decoder.layers"
    middle = f"{layer}.1.mlp.linear_fc1 to {layer}.30.mlp.linear_fc1 (30)"
    assert f"{middle}: 4096 -> 11008 a rank, fp8" in lines
    last = f"{layer}.31.mlp.linear_fc2: 5504 -> 4096 a rank, bf16 ({layer}.-1.*)"
    assert last in lines
    assert "language_model.output_layer: 4096 -> 16000 a rank, fp8" in lines
    assert "visual_head.heads.0 to visual_head.heads.7 (8): 2048 -> 2048 a rank, fp8" in lines
    kept = [line for line in lines if "bf16" in line]
    assert kept[-2].startswith("vision_encoder, embeddings, norms: bf16")
    assert kept[-1].startswith("attention between positions: bf16 (no kernel in 8 bits")
    assert lines[-1] == "visual tokenizer, routers of experts, losses: fp32"
    with pytest.raises(ConfigError, match="output_layer with 4000 outputs: no multiple of 128"):
        precision_lines(load(str(recipe), [*settings, "parallel.tp=8"]), sizes)
    assert precision_lines(load(str(recipe), []), sizes) == ["precision: bf16"]


@pytest.mark.parametrize(
    ("recipe", "tp", "changes", "bad"),
    [
        ("block", 1, {"model__language__ffn_hidden_size": 320}, "320 inputs"),
        ("block", 4, {}, "64 inputs"),
        ("mxfp8", 1, {"model__visual_head__width": 272}, "272 outputs"),
        ("current", 1, {"model__language__ffn_hidden_size": 260}, "260 inputs"),
    ],
)
def test_widths_that_a_recipe_cannot_multiply_are_config_errors(
    recipe: str, tp: int, changes: dict[str, int], bad: str
) -> None:
    run = run_of(recipe, parallel__tp=tp, **changes)
    with pytest.raises(ConfigError, match=f"{bad}.*no multiple of.*precision.fp8.exclude"):
        decide(linears(run, CODEBOOK_SIZES), run.precision.fp8)
    heads = run_of(recipe, exclude=())
    with pytest.raises(ConfigError, match=r"visual_head\.heads\.0 with 7 outputs"):
        decide(linears(heads, CODEBOOK_SIZES), heads.precision.fp8)


def losses_and_weights(run: Config, steps: int = 2) -> tuple[list[float], dict[str, torch.Tensor]]:
    with one_rank() as groups:
        bench = Bench(run, groups)
        return [bench.step(step).loss for step in range(steps)], bench.weights()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_in_8_bits_is_near_the_exact_one_and_computing_again_changes_no_bit(
    recipe: str,
) -> None:
    exact, _ = losses_and_weights(run_of("none", exclude=()))
    got, weights = losses_and_weights(run_of(recipe))
    assert got != exact
    assert got == pytest.approx(exact, rel=5e-3)  # measured 1.3e-3
    again, same = losses_and_weights(
        run_of(recipe, train__recompute="full", train__recompute_visual_head=True)
    )
    assert again == got
    assert all(torch.equal(x, same[name]) for name, x in weights.items())


def test_the_order_of_micro_batches_moves_delayed_scales_by_nothing() -> None:
    run = run_of("delayed")
    with one_rank() as groups:
        states = []
        for order in (1, -1):
            bench = Bench(run, groups)
            bench.step(0, step_batches(run, 0, groups)[::order])
            states.append({key: x.clone() for key, x, _ in bench.model.watched.state()})
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(x, states[1][key]) for key, x in states[0].items())
        assert any(float(x.max()) > 1 for x in states[0].values())


def test_a_step_that_is_given_up_leaves_no_trace_in_the_scales() -> None:
    run = run_of("delayed")
    with one_rank() as groups:
        plain, spiked = Bench(run, groups), Bench(run, groups)
        batches = step_batches(run, 7, groups)[:1]
        large = [
            dataclasses.replace(b, pixel_values_ICHW=b.pixel_values_ICHW * 50) for b in batches
        ]
        parts = (spiked.wrapped, spiked.optimizer, large, spiked.loss(large))
        with pytest.raises(AnomalyError, match="spike"):
            train_step(*parts, step=0, groups=groups, limit=0.0)
        for one in (plain, spiked):
            one.step(0)
        wanted = {key: x for key, x, _ in plain.model.watched.state()}
        got = {key: x for key, x, _ in spiked.model.watched.state()}
        assert [key for key, x in wanted.items() if not torch.equal(x, got[key])] == []


def test_a_continued_run_has_the_same_scales_and_weights_bit_for_bit(tmp_path: Path) -> None:
    run = run_of("delayed")
    with one_rank() as groups:
        bench, place = Bench(run, groups), folder(tmp_path)
        for step in range(3):
            bench.step(step)
        save(bench, place, 3)
        again = Bench(run, groups, resume=(place, find_resume(place, IDENTITY).meta))
        for one in (bench, again):
            one.step(3)
            one.step(4)
        wanted = {key: x for key, x, _ in bench.model.watched.state()}
        got = {key: x for key, x, _ in again.model.watched.state()}
        assert [key for key, x in wanted.items() if not torch.equal(x, got[key])] == []
        weights = bench.weights()
        assert all(torch.equal(x, weights[name]) for name, x in again.weights().items())


@pytest.mark.parametrize(("writer", "reader"), [("none", "delayed"), ("delayed", "none")])
def test_a_checkpoint_fits_whoever_multiplies(
    writer: str, reader: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the emulation there are no scales of ours to load, as on Transformer Engine."""
    write, again = run_of(writer), run_of(reader)
    with one_rank() as groups:
        bench, place = Bench(write, groups), folder(tmp_path)
        bench.step(0)
        save(bench, place, 1)
        wanted = {
            (part.key, part.offset): part.memory for part in parts(bench.chunks, bench.optimizer)
        }
        meta = find_resume(place, IDENTITY).meta
        with caplog.at_level("WARNING"):
            _announce_changes(write, meta, groups)
        assert "it goes on with" not in caplog.text
        with caplog.at_level("WARNING"):
            _announce_changes(again, meta, groups)
        emulated = (reader == "delayed", writer == "delayed")
        told = "other products: precision.fp8.emulate {} instead of {}.".format(*emulated)
        assert told in caplog.text
        assert ("collects them anew" in caplog.text) == (reader == "delayed")
        other = Bench(again, groups, resume=(place, meta))
        got = {
            (part.key, part.offset): part.memory.clone()
            for part in parts(other.chunks, other.optimizer)
        }
        own = got.keys() ^ wanted.keys()
        assert own
        assert all(key.startswith(STATE) for key, _ in own)
        assert all(torch.equal(got[key], wanted[key]) for key in got.keys() - own)
        if reader == "delayed":
            fresh = {key: x for key, x, _ in Bench(again, groups).model.watched.state()}
            assert all(torch.equal(got[key, offset], fresh[key]) for key, offset in own)
        assert other.step(1).loss == pytest.approx(bench.step(1).loss, rel=5e-3)


def test_answers_are_not_in_8_bits() -> None:
    answering = _plain(run_of("block", parallel__tp=2, parallel__pp=2))
    assert answering.precision.fp8 == Fp8Config()
    assert (answering.parallel.tp, answering.parallel.pp) == (2, 1)
