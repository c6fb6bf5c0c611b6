import dataclasses

import pytest

from megatron_asvr.config.check import check
from megatron_asvr.config.compare import differences
from megatron_asvr.config.load import PRESETS, flatten, from_dict, load, save, to_dict
from megatron_asvr.config.schema import Config, LanguageConfig, VisionConfig, VisualHeadConfig
from megatron_asvr.errors import ConfigError

FILES = [
    "model.text_tokenizer=t.model",
    "model.visual_tokenizer=tok",
    "data.train=[{path: a.json}]",
]


def good(*overrides):
    return load(None, [*FILES, "train.steps=10", *overrides])


def test_precedence_is_preset_then_yaml_then_override(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {steps: 1, global_batch: 64, micro_batch: 2}\n")
    top = tmp_path / "top.yaml"
    top.write_text("preset: base.yaml\ntrain: {steps: 2, global_batch: 32}\n")
    train = load(top, ["train.steps=3"]).train
    assert (train.steps, train.global_batch, train.micro_batch) == (3, 32, 2)


def test_saved_configuration_reads_back_equal(tmp_path):
    config = good("parallel.tp=2", "model.language.sliding_window=128")
    save(config, tmp_path / "c.yaml")
    assert load(tmp_path / "c.yaml") == config
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.global_bach=4", ["train.global_bach", "global_batch"]),
        ("trian.steps=4", ["trian", "'train'"]),
        ("train.steps=many", ["train.steps='many'", "int"]),
        ("train.steps=true", ["train.steps=True", "int"]),
        ("loss.mode=exakt", ["loss.mode='exakt'", "nearest: 'exact'", "official"]),
        ("loss.target_shift=2", ["loss.target_shift=2", "0, 1"]),
        ("data.train=a.json", ["data.train='a.json'", "list"]),
        ("data.train=[{pat: a}]", ["data.train[0].pat", "path"]),
        ("data.train=[{images: a}]", ["data.train[0].path", "required"]),
        ("train=3", ["train=3", "mapping"]),
        ("train", ["a.b=c"]),
        ("train.optim.lr=[", ["not valid YAML"]),
        ("train.optim.lr=.inf", ["train.optim.lr=inf", "finite"]),
        ("loss.visual_weight=nan", ["loss.visual_weight='nan'", "finite"]),
        ("train.optim.lr=[1]", ["train.optim.lr=[1]", "float"]),
    ],
)
def test_a_wrong_setting_is_named_with_the_way_out(override, words):
    with pytest.raises(ConfigError) as err:
        load(None, [override])
    assert all(word in str(err.value) for word in words), str(err.value)


def test_a_graph_of_an_encoder_that_no_step_runs_is_refused():
    with pytest.raises(ConfigError, match=r"with data\.features=cache no step runs it"):
        check(good("train.cuda_graphs=true", "data.features=cache"))


def test_float_written_without_a_dot_is_a_float():
    assert good("train.optim.lr=1e-3").train.optim.lr == 1e-3


def test_missing_file_lists_presets():
    with pytest.raises(ConfigError, match="vicuna7b_stage1"):
        load("vicuna7b_stage")


def test_preset_loop_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("preset: a.yaml\n")
    with pytest.raises(ConfigError, match="back to itself"):
        load(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.language.num_kv_heads=5", ["num_kv_heads=5", "num_heads=32"]),
        ("model.vision.feature_layer=28", ["feature_layer=28", "-28 to 27"]),
        ("model.visual_head.num_heads=3", ["num_heads=3", "width=2048"]),
        ("train.epochs=1", ["exactly one", "steps", "epochs"]),
        ("train.micro_batch=3", ["global_batch=256", "micro_batch=3"]),
        ("train.optim.min_lr=1", ["min_lr=1.0", "lr=0.001"]),
        ("loss.visual_weight=-1", ["visual_weight=-1"]),
        ("loss.visual_weight=0", ["visual_head", "visual_weight=0"]),
        ("model.visual_tokenizer=null", ["visual_tokenizer", "asvr tokenizer fit"]),
        ("data.train=[]", ["data.train is empty"]),
        ("train.trainable=[]", ["trainable is empty", "projector"]),
        ("train.trainable=[projector, projector]", ["projector twice"]),
        ("train.cosine_every_steps=-1", ["cosine_every_steps=-1", "negative"]),
        (
            "train={optim: {overlap_grad_reduce: true}, cosine_every_steps: 2, steps: 9}",
            ["overlap_grad_reduce=true", "train.cosine_every_steps does not allow"],
        ),
        (
            "train={cuda_graphs: true, trainable: [vision_encoder, projector], steps: 9}",
            ["train.cuda_graphs=true", "names vision_encoder; freeze it"],
        ),
        (
            "train={optim: {overlap_grad_reduce: true}, anomaly: {on_spike: skip}, steps: 9}",
            ["overlap_grad_reduce=true", "train.anomaly.on_spike=skip"],
        ),
        ("model.language.head_dim=33", ["head_dim=33", "even"]),
        ("model.vision.norm_eps=0", ["model.vision.norm_eps=0.0", "positive"]),
        ("data.max_length=5000", ["max_length=5000", "max_positions=4096"]),
        ("data.prefetch_batches=-1", ["prefetch_batches=-1", "negative"]),
        ("data.train=[{path: a, weight: 0}]", ["data.train[0].weight=0", "positive"]),
        ("data.train=[{path: a, weight: 1}, {path: b}]", ["1 of 2 sources have a weight"]),
        ("data.train=[{path: a, weight: 1, epochs: 2}]", ["weight=1.0 and epochs=2.0", "one of"]),
        ("data.train=[{path: a, name: x}, {path: b, name: x}]", ["'x' twice"]),
        ("data.eval=[{path: a, epochs: 2}]", ["data.eval[0]", "leave out weight and epochs"]),
        ("data.pack_length=0", ["data.pack_length=0", "positive"]),
        ("model.language.num_experts=4", ["num_experts=4", "mixtral or qwen3_moe"]),
        ("model.language.family=mixtral", ["num_experts >= 2", "got None"]),
        ("run.seed=-1", ["run.seed=-1", "negative"]),
        ("data.template=vicuna_v2", ["data.template='vicuna_v2'", "nearest: 'vicuna_v1'", "plain"]),
    ],
)
def test_impossible_settings_are_refused_before_work(override, words):
    with pytest.raises(ConfigError) as err:
        check(good(override))
    assert all(word in str(err.value) for word in words), str(err.value)


def test_official_mode_refuses_what_it_is_not_defined_for():
    official = good("loss.mode=official")
    assert check(official, 1) == official
    with pytest.raises(ConfigError, match="one data-parallel rank"):
        check(official, 2)
    with pytest.raises(ConfigError, match="target_shift"):
        check(good("loss.mode=official", "loss.target_shift=1"))


def test_a_default_written_out_is_no_difference_and_another_width_is():
    lm, head = LanguageConfig(), VisualHeadConfig()
    written = LanguageConfig(num_kv_heads=32, head_dim=128, init_std=0.5, max_positions=9)
    assert differences(lm, written) == []
    assert differences(head, VisualHeadConfig(num_heads=16)) == []
    assert differences(VisionConfig(), VisionConfig(feature_layer=3)) == []
    other = LanguageConfig(num_kv_heads=8, rope_theta=1e6)
    assert differences(lm, other) == [("num_kv_heads", 32, 8), ("rope_theta", 1e4, 1e6)]


def test_feature_layer_counts_layers_to_run():
    for layer, wanted in ((-1, 27), (-2, 26), (0, 0), (5, 5)):
        assert VisionConfig(feature_layer=layer).num_feature_layers == wanted


@pytest.mark.parametrize("preset", sorted(p.stem for p in PRESETS.glob("*.yaml")))
def test_every_preset_passes_the_checks(preset):
    check(load(preset, FILES), 8)


def test_flatten_names_every_leaf():
    names = flatten(good())
    assert names["train.optim.lr"] == 1e-3
    assert names["model.vision.patch_size"] == 14
    assert not any(dataclasses.is_dataclass(v) for v in names.values())
    assert len(names) > len(dataclasses.fields(Config))
