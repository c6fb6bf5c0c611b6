"""Who computes the layers and who multiplies in 8 bits: a choice with a reason, or a refusal."""

import dataclasses
import sys

from megatron_asvr.platforms import apex, mcore  # noqa: F401
from megatron_asvr.platforms.cpu import CpuPlatform

import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_asvr import precision
from megatron_asvr.config.check import check
from megatron_asvr.config.precision import check_precision
from megatron_asvr.config.schema import Config, Fp8Config, PrecisionConfig
from megatron_asvr.errors import ConfigError
from megatron_asvr.model.megatron_config import transformer_config
from megatron_asvr.precision.fp8.policy import Linear, decide
from tests.language_cases import CASES, one_rank
from tests.run_cases import config

RECIPES = ("delayed", "current", "block", "mxfp8")


def asked(recipe: str, *, emulate: bool = False, backend: str = "auto") -> PrecisionConfig:
    return PrecisionConfig(backend=backend, fp8=Fp8Config(recipe=recipe, emulate=emulate))


class Gpu(CpuPlatform):
    """As much of a GPU as the choice looks at."""

    name = "cuda"

    def __init__(
        self, capability: tuple[int, int], cuda_version: tuple[int, int] = (13, 0)
    ) -> None:
        super().__init__()
        self.compute_capability = capability
        self.cuda_version = cuda_version


@pytest.mark.parametrize("recipe", RECIPES)
def test_8_bits_are_refused_where_nothing_can_do_them_and_emulated_where_told(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"needs CUDA.*emulate=true"):
        precision.select_fp8(CpuPlatform(), torch.bfloat16, asked(recipe))
    with pytest.raises(ConfigError, match=r"no fp32 kernel.*emulate=true"):
        precision.select_fp8(Gpu((10, 0)), torch.float32, asked(recipe))
    # The GPU is there, Transformer Engine is not: in bf16 alone layers would be the local ones.
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    assert precision.select_backend(Gpu((10, 0)), torch.bfloat16)[0] == "local"
    with pytest.raises(ConfigError, match=r"cannot be imported.*emulate=true"):
        precision.select_fp8(Gpu((10, 0)), torch.bfloat16, asked(recipe))
    settings = asked(recipe, emulate=True)
    assert precision.select_fp8(CpuPlatform(), torch.float32, settings)[0] == "emulated"
    assert precision.select_backend(Gpu((10, 0)), torch.bfloat16, settings)[0] == "local"


@pytest.mark.parametrize(
    ("recipe", "capability"),
    [("delayed", (8, 9)), ("current", (8, 9)), ("block", (9, 0)), ("mxfp8", (10, 0))],
)
def test_each_recipe_needs_its_generation_of_tensor_cores(
    recipe: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_without_te", lambda *_: None)
    engine, _ = precision.select_fp8(Gpu(capability), torch.bfloat16, asked(recipe))
    assert engine == "te"
    older = {(8, 9): (8, 0), (9, 0): (8, 9), (10, 0): (9, 0)}[capability]
    with pytest.raises(ConfigError, match="compute capability"):
        precision.select_fp8(Gpu(older), torch.bfloat16, asked(recipe))
    if recipe == "mxfp8":
        with pytest.raises(ConfigError, match=r"below \(12, 0\), got \(12, 0\)"):
            precision.select_fp8(Gpu((12, 0)), torch.bfloat16, asked(recipe))
    else:
        assert precision.select_fp8(Gpu((12, 0)), torch.bfloat16, asked(recipe))[0] == "te"


def test_scaling_by_blocks_needs_a_new_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_without_te", lambda *_: None)
    kinds = {recipe: asked(recipe) for recipe in ("current", "block")}
    for version in ((12, 9), (13, 0)):
        assert precision.select_fp8(Gpu((9, 0), version), torch.bfloat16, kinds["block"])[0] == "te"
    older = Gpu((9, 0), (12, 8))
    assert precision.select_fp8(older, torch.bfloat16, kinds["current"])[0] == "te"
    with pytest.raises(ConfigError, match=r"needs CUDA \(12, 9\), torch was built with \(12, 8\)"):
        precision.select_fp8(older, torch.bfloat16, kinds["block"])


def test_the_backend_can_be_named_and_is_refused_where_it_is_not() -> None:
    local = PrecisionConfig(backend="local")
    assert precision.select_backend(Gpu((9, 0)), torch.bfloat16, local)[0] == "local"
    with pytest.raises(ConfigError, match=r"precision\.backend=te"):
        precision.select_backend(CpuPlatform(), torch.bfloat16, PrecisionConfig(backend="te"))
    with pytest.raises(ConfigError, match="leave one of them out"):
        check_precision(Config(precision=asked("block", emulate=True, backend="te")))


@pytest.mark.parametrize(
    ("name", "value"),
    [("margin", -1), ("history", 0), ("guard_every_steps", -1), ("guard_min_cosine", 1.0)],
)
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    fp8 = dataclasses.replace(Fp8Config(), **{name: value})
    run = dataclasses.replace(config(), precision=PrecisionConfig(fp8=fp8))
    with pytest.raises(ConfigError, match=f"precision.fp8.{name}"):
        check(run)


KEPT = {"precision__fp8__recipe": "current", "precision__fp8__weights": True}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"precision__fp8__recipe": "none"}, "multiplies nothing here"),
        ({"precision__fp8__emulate": True}, "multiplies nothing here"),
        ({"precision__fp8__recipe": "mxfp8"}, "does not go with recipe=mxfp8"),
        ({"train__optim__distributed": False}, "needs train.optim.distributed=true"),
        ({"train__trainable": ["projector"]}, "would round the language model for good"),
        ({"precision__fp8__guard_every_steps": 3}, "nothing exact to compare with"),
    ],
)
def test_weights_are_kept_in_8_bits_where_that_can_be_and_refused_where_not(
    changes: dict[str, object], why: str
) -> None:
    fits = {**KEPT, "train__optim__distributed": True}
    check_precision(config(**fits))
    with pytest.raises(ConfigError, match=f"precision.fp8.weights=true .*{why}"):
        check_precision(config(**{**fits, **changes}))


def test_what_is_kept_out_of_8_bits_does_not_hold_its_weight_in_them() -> None:
    names = ["language_model.decoder.layers.0.mlp.linear_fc1", "language_model.output_layer"]
    linears = [Linear(name, 32, 32) for name in names]
    for pattern, kept in (("*.output_layer", True), ("*.linear_fc1", False)):
        settings = Fp8Config(recipe="current", weights=True, exclude=(pattern,))
        if kept:
            assert decide(linears, settings)["language_model.output_layer"] == pattern
            continue
        with pytest.raises(ConfigError, match="names 1 of them, for example language_model"):
            decide(linears, settings)


def test_gradients_are_added_in_the_products_where_megatron_core_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused, why = precision.fuse_gradients(CpuPlatform())
    assert (fused, why.split(",")[0]) == (False, "on a CPU our own products do so")
    monkeypatch.setattr(apex, "detect", lambda: (False, "not installed (optional)"))
    fused, why = precision.fuse_gradients(Gpu((9, 0)))
    assert not fused
    assert why.endswith(
        "needs apex's fused_weight_gradient_mlp_cuda for it; apex: not installed (optional)"
    )
    monkeypatch.setattr(apex, "detect", lambda: (True, "NVIDIA's apex"))
    for built in (False, True):
        monkeypatch.setattr(apex, "compiled_parts", lambda built=built: {apex.FUSED: built})
        assert precision.fuse_gradients(Gpu((9, 0)))[0] is built
    # What megatron-core does without it, which is why this is not left to it.
    with one_rank() as groups:
        own = transformer_config(CASES["llama"], groups.plan, torch.float32)
        own = dataclasses.replace(own, gradient_accumulation_fusion=True)
        with pytest.raises(RuntimeError, match=apex.FUSED):
            ColumnParallelLinear(8, 8, config=own, init_method=lambda _: None)


def test_megatron_core_is_told_what_the_run_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_without_te", lambda *_: None)
    told = precision.megatron_settings(Gpu((10, 0)), torch.bfloat16, asked("current"))
    assert (told["fp8"], told["fp8_recipe"]) == ("hybrid", "tensorwise")
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert set(told) <= fields
    assert {Fp8Recipe(precision._MEGATRON_RECIPES[recipe]) for recipe in RECIPES} == {
        Fp8Recipe.delayed,
        Fp8Recipe.tensorwise,
        Fp8Recipe.blockwise,
        Fp8Recipe.mxfp8,
    }
    assert told["fp8_param"] is False
    kept = PrecisionConfig(fp8=Fp8Config(recipe="current", weights=True))
    assert precision.megatron_settings(Gpu((9, 0)), torch.bfloat16, kept)["fp8_param"] is True
    emulated = asked("current", emulate=True)
    assert precision.megatron_settings(CpuPlatform(), torch.bfloat16, emulated) == {}
