"""Certifying, in one process: shrinking, samples and missing inputs, probes, the comparison."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_asvr.cli.certify import table, with_layout
from megatron_asvr.cli.main import main
from megatron_asvr.config.check import check
from megatron_asvr.config.load import load, override, save
from megatron_asvr.config.schema import (
    LanguageConfig,
    ParallelConfig,
    PrecisionConfig,
    SourceConfig,
    VisionConfig,
)
from megatron_asvr.data.files import read_table
from megatron_asvr.errors import ConfigError
from megatron_asvr.planner.parameters import count_parameters
from megatron_asvr.train.certify import Certificate, Request, _one_step
from megatron_asvr.train.excerpt import make_excerpt
from megatron_asvr.train.probes import Probe, compare_probes, direction
from megatron_asvr.train.shrink import shrink
from megatron_asvr.train.verdict import Facts, Measurement, judge, save_gradient
from tests.run_data import make_files, run_config

LAYOUT = ParallelConfig(tp=4, pp=2, vpp=2, sp=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("certify") / "files")


# --- shrinking


def vicuna(**language):
    config = load("vicuna7b_stage2")
    model = replace(config.model, text_tokenizer="t", visual_tokenizer="v")
    data = replace(config.data, train=(SourceConfig(path="x"),))
    if language:
        model = replace(model, language=replace(model.language, **language))
    return replace(config, model=model, data=data, parallel=LAYOUT)


def test_a_vicuna_7b_becomes_small_and_still_fits_its_layout():
    config = vicuna()
    small = check(shrink(config), 16)
    sizes = count_parameters(small.model, (16384,) * 8, 1152)
    assert sum(sizes.values()) < 30e6 < sum(count_parameters(config.model, None).values())
    lm = small.model.language
    assert (lm.num_layers, lm.num_heads, lm.kv_heads, lm.vocab_size) == (4, 4, 4, 32000)
    assert lm.ffn_hidden_size / lm.hidden_size == pytest.approx(11008 / 4096, rel=0.1)
    assert small.model.vision.num_patches == 729


@pytest.mark.parametrize(
    ("settings", "heads", "groups"),
    [
        ({"num_kv_heads": 8}, 16, 4),
        ({"family": "qwen3", "num_kv_heads": 4, "head_dim": 256, "hidden_size": 2048}, 32, 4),
        ({"family": "mixtral", "num_experts": 8, "num_kv_heads": 8}, 16, 4),
    ],
)
def test_shrinking_keeps_the_structure(settings, heads, groups):
    config = vicuna(**settings)
    lm = shrink(config).model.language
    assert (lm.num_heads, lm.kv_heads, lm.num_experts) == (
        heads,
        groups,
        settings.get("num_experts"),
    )
    big = config.model.language
    assert lm.hidden_size / (lm.num_heads * lm.width_per_head) == (
        big.hidden_size / (big.num_heads * big.width_per_head)
    )
    check(shrink(config), 16)


def test_shrinking_keeps_uneven_stages_and_replicated_heads():
    config = vicuna()
    head = replace(config.model.visual_head, width=96, num_heads=6)
    stages = ParallelConfig(tp=4, pp=5, stages=(8, 9, 9, 0, 6))
    config = replace(config, model=replace(config.model, visual_head=head), parallel=stages)
    small = check(shrink(config), 20)
    assert small.parallel.stages == (1, 2, 2, 0, 1)
    assert small.model.language.num_layers == 6
    assert small.model.visual_head.heads == 6


@pytest.mark.parametrize("layer", [-2, -1, 3, 27, 0])
def test_the_shrunk_encoder_still_stops_at_its_feature_layer(layer):
    config = vicuna()
    vision = VisionConfig(feature_layer=layer)
    small = shrink(replace(config, model=replace(config.model, vision=vision))).model.vision
    assert small.num_feature_layers == min(2, vision.num_feature_layers)
    assert (small.num_layers > small.num_feature_layers) == (vision.num_feature_layers < 27)


def test_a_small_model_is_not_enlarged():
    tiny = LanguageConfig(
        hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_hidden_size=48
    )
    config = replace(vicuna(), parallel=ParallelConfig())
    small = shrink(replace(config, model=replace(config.model, language=tiny))).model.language
    assert small == replace(tiny, head_dim=8)


# --- samples and inputs


def test_only_the_chosen_images_are_touched(files, tmp_path):
    config = run_config(files, tmp_path / "run", data__cache_dir=str(tmp_path / "codes"))
    config = replace(config, train=replace(config.train, global_batch=4))
    excerpt = make_excerpt(config, tmp_path, prepare=True)
    (index,) = (tmp_path / "codes").glob("images-*/*.arrow")
    (source,) = excerpt.config.data.train
    records = json.loads(Path(source.path).read_text())
    used = {path for record in records for path in record.get("image", [])}
    assert [record["id"] for record in records] == excerpt.samples
    assert set(read_table(index)["path"].to_pylist()) == used
    assert all(Path(path).is_absolute() for path in used)


def test_a_bad_image_gives_way_to_the_next_good_record(tmp_path):
    files = make_files(tmp_path / "files")
    config = run_config(files, tmp_path / "run", train__global_batch=4)
    before = make_excerpt(config, tmp_path, prepare=True).samples
    broken = next(name for name in before if name != "text")
    (files / "images" / f"{broken[1:]}.png").write_bytes(b"no image")
    excerpt = make_excerpt(config, tmp_path, prepare=True)
    assert broken not in excerpt.samples
    assert len(excerpt.samples) == 4
    assert list(excerpt.replaced) == [str(files / "images" / f"{broken[1:]}.png")]


def test_more_samples_than_records_get_names_of_their_own(files, tmp_path):
    config = run_config(files, tmp_path / "run", train__global_batch=30)
    samples = make_excerpt(config, tmp_path, prepare=True).samples
    assert len(set(samples)) == 30
    assert "text (copy 2)" in samples


def test_everything_missing_is_named_at_once(files, tmp_path):
    config = run_config(
        files,
        tmp_path / "run",
        model__text_tokenizer=str(tmp_path / "no.model"),
        model__visual_tokenizer=str(tmp_path / "no-visual"),
        init__language_model=str(tmp_path / "no-weights"),
        data__train=[{"path": str(tmp_path / "a.json")}, {"path": str(tmp_path / "b.json")}],
    )
    with pytest.raises(ConfigError) as caught:
        make_excerpt(config, tmp_path, prepare=False)
    for name in ("a.json", "b.json", "no.model", "no-visual", "no-weights"):
        assert name in str(caught.value)


def test_missing_images_and_codes_are_named_with_the_way_out(files, tmp_path):
    elsewhere = [{"path": str(files / "train.json"), "images": str(tmp_path)}]
    config = run_config(files, tmp_path / "run", data__train=elsewhere)
    with pytest.raises(ConfigError, match=r"missing file.*right folder"):
        make_excerpt(config, tmp_path, prepare=True)
    config = run_config(files, tmp_path / "run", data__cache_dir=str(tmp_path / "codes"))
    with pytest.raises(ConfigError, match=r"no codes of \d of \d images; add --prepare"):
        make_excerpt(config, tmp_path, prepare=False)


# --- probes


def probe(values, norm=1.0):
    column = np.asarray(values, dtype=float)[:, None]
    return Probe(np.arange(len(column)) + 2**32, column, np.full_like(column, norm))


def test_the_largest_difference_names_module_sample_and_place():
    want = {("a", 0): probe([1, 2, 3]), ("b", 0): probe([1, 2, 3], 100.0)}
    got = {("b", 0): probe([1, 2, 4], 100.0), ("a", 1): probe([1, 2.5, 3]), ("a", 0): want["a", 0]}
    a, b = compare_probes(want, got)
    assert (a.name, a.error, a.sample, a.place, a.tp_rank) == ("a", 0.5, 1, 1, 1)
    assert (b.name, b.error, b.place) == ("b", 0.01, 2)


@pytest.mark.parametrize(
    "got",
    [
        {},
        {("a", 0): probe([1, 2])},
        {("a", 0): probe([1, 2, math.nan])},
    ],
)
def test_what_is_missing_or_no_number_differs(got):
    (difference,) = compare_probes({("a", 0): probe([1, 2, 3])}, got)
    assert difference.error == math.inf


def test_exact_values_have_no_tolerance():
    codes = probe([1, 2, 3], norm=0.0)
    assert compare_probes({("a", 0): codes}, {("a", 0): codes})[0].error == 0
    other = probe([1, 2, 3 + 1e-9], norm=0.0)
    assert compare_probes({("a", 0): codes}, {("a", 0): other})[0].error == math.inf


def test_copies_of_a_sample_are_added_in_any_order():
    a, b = probe([1, 2]), probe([10, 20, 30])
    assert Probe.join([a, b]).values[:, 0].tolist() == [11, 22, 30]
    assert (Probe.join([a, b]).keys == Probe.join([b, a]).keys).all()


def test_directions_depend_on_the_name_only():
    assert torch.equal(direction("a", 4), direction("a", 4))
    assert not torch.equal(direction("a", 4), direction("b", 4))


# --- the comparison


NAMES = ["visual_head.norm.weight", "projector.linear_1.weight", "key.bias"]


def measurement(folder, *, scale=1.0, noise=0.0, skip=None, **facts):
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate(NAMES):
        gradient = torch.randn(8, generator=generator) * (1e-9 if name == "key.bias" else 1.0)
        if name != skip:
            save_gradient(folder, name, gradient * (scale if number else 1.0) + noise)
    found = {
        "losses": {"loss": 3.0, "text loss": 2.0, "visual loss": 1.0},
        "targets": {"text": 30, "visual": 12},
        "grad_norm": 4.0,
        "divisors": [("rank 0", {"text": 30, "visual": 12})],
        "parameters": NAMES,
        **facts,
    }
    return Measurement(facts=Facts(**found), folder=folder)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({}, None),
        ({"noise": 1e-9}, None),  # the bias without a gradient is compared with the whole one
        ({"scale": 1.01}, "first wrong one of the backward pass is projector.linear_1.weight"),
        ({"scale": math.nan}, "projector.linear_1.weight"),
        ({"skip": NAMES[0]}, "visual_head.norm.weight"),
        (
            {"divisors": [("rank 1 (dp 1)", {"text": 14, "visual": 12})]},
            "wrong denominator of the text loss: rank 1 (dp 1) divides by 14",
        ),
        ({"targets": {"text": 29, "visual": 12}}, "counts 29 text targets, one rank 30"),
        (
            {"losses": {"loss": 3.1, "text loss": 2.0, "visual loss": 1.0}},
            "each loss agrees but their sum does not",
        ),
        ({"collectives": ["rank 0: x; rank 1: y"]}, "collectives differ: rank 0: x; rank 1: y"),
    ],
)
def test_a_difference_fails_and_is_named(tmp_path, changes, place):
    want = measurement(tmp_path / "a")
    got = measurement(tmp_path / "b", **changes)
    verdict = judge(want, got, precision="fp32", samples=[])
    assert verdict.ok == (place is None)
    assert all(place in " ".join(verdict.places) for place in [place] if place)


@pytest.mark.parametrize("change", [{"grad_norm": 4.01}, {"losses": {"loss": 3.1}}])
def test_bf16_has_its_own_bounds(tmp_path, change):
    want = measurement(tmp_path / "a", losses={"loss": 3.0})
    near = {"grad_norm": 4.01, "losses": {"loss": 3.01}, "scale": 1.01, **change}
    got = measurement(tmp_path / "b", **near)
    assert judge(want, got, precision="bf16", samples=[]).ok == ("grad_norm" in change)
    assert not judge(want, got, precision="fp32", samples=[]).ok


def test_the_report_is_plain_json(tmp_path):
    want = measurement(tmp_path / "a")
    got = measurement(tmp_path / "b", scale=math.nan)
    verdict = judge(want, got, precision="fp32", samples=[])
    request = Request(config=vicuna(), dp=2)
    certificate = Certificate(verdict=verdict, request=request, samples=["q0"], replaced={})
    report = json.loads(json.dumps(certificate.plain(), allow_nan=False))
    assert report["ok"] is False
    assert report["layout"]["dp"] == 2
    printed = table(report, request.world)
    assert "tp=4, pp=2, vpp=2, sp=true, dp=2 (16 ranks)" in printed[0]
    assert printed[-1] == "FAIL"


# --- the command line


def test_layouts_are_compared_without_8_bits():
    fp8 = replace(PrecisionConfig().fp8, recipe="block", emulate=True)
    config = replace(vicuna(), precision=PrecisionConfig(backend="local", fp8=fp8))
    step = _one_step(Request(config=config, dp=2))
    assert step.precision == PrecisionConfig(backend="local")


def test_a_layout_is_read_from_text():
    config = replace(load(), parallel=ParallelConfig(tp=8, stages=(20, 12)))
    got, dp = with_layout(config, "tp=2, pp=2,dp=3,sp=true")
    assert got.parallel == ParallelConfig(tp=2, pp=2, sp=True, stages=(20, 12))
    assert dp == 3
    assert with_layout(config, "cp=2")[0].parallel == ParallelConfig(cp=2)
    stages = ParallelConfig(pp=2, stages=(4, 0))
    assert with_layout(config, "stages=[4, 0],pp=2,dp=3") == (replace(config, parallel=stages), 3)
    together = override(config, ["parallel={pp: 2, head_alone: false}"])
    assert with_layout(together, "pp=4")[0].parallel == ParallelConfig(pp=4, head_alone=False)
    alone, _ = with_layout(together, "pp=4,head_alone=true")
    assert alone.parallel == ParallelConfig(pp=4, head_alone=True)
    assert with_layout(together, "tp=2")[0].parallel == ParallelConfig(tp=2)


@pytest.mark.parametrize("text", ["tp=x", "q=2", "dp=0", "dp=x", "tp"])
def test_a_wrong_layout_is_refused(text):
    with pytest.raises(ConfigError):
        with_layout(load(), text)


def test_impossible_layouts_list_every_problem(files, tmp_path, capsys):
    save(run_config(files, tmp_path / "run"), tmp_path / "run.yaml")
    assert main(["certify", str(tmp_path / "run.yaml"), "--layout", "tp=3,pp=5"]) == 1
    printed = capsys.readouterr().err
    assert "parallel.tp=3" in printed
    assert "parallel.pp=5" in printed
    wrong = ["--layout", "dp=2", "--samples", "5"]
    assert main(["certify", str(tmp_path / "run.yaml"), *wrong]) == 1
    assert "use a multiple of 4" in capsys.readouterr().err
