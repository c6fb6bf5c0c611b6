"""The whole model on Transformer Engine has the parameters that it has on the local layers.

Built on the meta device, so nothing computes and no GPU is needed, but the compiled extension of
Transformer Engine is: `make test-te` builds it (docs/gpu.md).
"""

import dataclasses
import importlib
import importlib.util
import re
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron)
from megatron_asvr.platforms.cpu import CpuPlatform
from megatron_asvr.platforms.deterministic import VARIABLES

import pytest
import torch
from torch import Tensor

from megatron_asvr import platforms, precision
from megatron_asvr.checkpoint.load import find_resume
from megatron_asvr.checkpoint.state import parts
from megatron_asvr.config.precision import check_precision
from megatron_asvr.config.schema import (
    Config,
    Fp8Config,
    LanguageConfig,
    PrecisionConfig,
    RunConfig,
)
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.model import linears, sharding
from megatron_asvr.model.asvr import AsvrModel
from megatron_asvr.model.sharding import full_state
from megatron_asvr.parallel import groups as process_groups
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.plan import ParallelPlan
from megatron_asvr.precision.fp8 import policy, quantize
from tests import asvr_cases, run_cases
from tests.language_cases import CASES, MIXTURES, one_rank
from tests.run_cases import Bench

pytestmark = pytest.mark.te


LAYERS = {**CASES, **MIXTURES}


class NoGpu(CpuPlatform):
    """A GPU on which nothing can be computed."""

    name = "cuda"
    compute_capability = (10, 0)
    cuda_version = (13, 0)

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self._device


def pretend(monkeypatch: pytest.MonkeyPatch, device: str = "meta") -> None:
    """Transformer Engine finds a device, and what is asked for on it is made on another one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
    monkeypatch.setattr(platforms, "select", lambda: (NoGpu(device), "for this test"))


@pytest.fixture(autouse=True)
def _meta(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def config(language: LanguageConfig, fp8: Fp8Config) -> Config:
    """A run whose widths 8 bits can multiply."""
    wide = dataclasses.replace(
        language,
        hidden_size=256,
        head_dim=None,
        ffn_hidden_size=256,
        expert_ffn_hidden_size=128 if language.is_mixture else None,
    )
    run = asvr_cases.config(precision="bf16")
    head = dataclasses.replace(run.model.visual_head, width=256)
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, language=wide, visual_head=head),
        precision=PrecisionConfig(fp8=fp8),
    )


def build(run: Config, backend: str, groups: Groups) -> AsvrModel:
    settings = PrecisionConfig(backend=backend)
    if backend == "te":
        settings = dataclasses.replace(run.precision, backend=backend)
    run = dataclasses.replace(run, precision=settings)
    tokenizer = asvr_cases.tokenizer()
    with torch.device("meta"):
        model = AsvrModel(run, groups=groups, tokenizer=tokenizer)
    model.watched = linears.in_8_bits(model, run, groups=groups, tokenizer=tokenizer)
    return model


def described(model: AsvrModel, groups: Groups) -> dict[str, tuple[Any, ...]]:
    """All that a checkpoint depends on: name, this rank's shape and the full one, how it is cut."""
    return {
        name: (
            tuple(parameter.shape),
            sharding.full_shape(parameter, groups=groups),
            parameter.dtype,
            sharding.is_split(parameter),
            getattr(parameter, "partition_dim", None) if sharding.is_split(parameter) else None,
            getattr(parameter, "asvr_blocks", 1),
            sharding.is_expert(parameter),
        )
        for name, parameter in sharding.named(model)
    }


@pytest.mark.parametrize("case", LAYERS)
def test_a_checkpoint_of_one_backend_is_one_of_the_other(case: str) -> None:
    run = config(LAYERS[case], Fp8Config())
    with one_rank() as groups:
        local, te = build(run, "local", groups), build(run, "te", groups)
        assert (local.language_model.backend, te.language_model.backend) == ("local", "te")
        assert described(te, groups) == described(local, groups)
        linear = te.language_model.decoder.layers[0].self_attention.linear_qkv
        assert isinstance(
            linear, importlib.import_module("transformer_engine.pytorch").LayerNormLinear
        )


def differences(cases: Sequence[str], plan: ParallelPlan) -> dict[str, tuple[int, list[str]]]:
    """For each model its parameters, and which are not the same on both kinds of layers."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch)
        groups = process_groups.initialize(plan, 60.0)
        for case in cases:
            run = config(LAYERS[case], Fp8Config())
            te, local = (described(build(run, kind, groups), groups) for kind in ("te", "local"))
            names = sorted(te.keys() | local.keys())
            found[case] = (len(names), [x for x in names if te.get(x) != local.get(x)])
    return found


@pytest.mark.parametrize(
    ("cases", "degrees"), [(CASES, {"tp": 2, "sp": True}), (MIXTURES, {"tp": 2, "ep": 2})]
)
def test_two_tensor_parallel_ranks_hold_the_same_parts(
    cases: Mapping[str, LanguageConfig], degrees: dict[str, Any]
) -> None:
    plan = ParallelPlan(**degrees, world=2)
    found = run_ranks(differences, (tuple(cases), plan), 2, timeout_s=120)
    assert list(found) == list(cases)
    for number, different in found.values():
        assert number > 20
        assert different == []


WIDE = {
    "train__precision": "bf16",
    "model__language__hidden_size": 256,
    "model__language__ffn_hidden_size": 256,
    "model__visual_head__width": 256,
}


def held(bench: Bench) -> dict[tuple[str, Any], torch.Tensor]:
    """Everything that a checkpoint of it holds."""
    every = parts(bench.chunks, bench.optimizer)
    return {(part.key, part.offset): part.memory.clone() for part in every}


@pytest.mark.parametrize(("writer", "reader"), [("te", "local"), ("local", "te")])
def test_a_run_saved_by_one_backend_goes_on_with_the_other(
    writer: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and the optimizer's state; what Transformer Engine keeps beside them is left out."""
    pretend(monkeypatch, "cpu")
    settings = {kind: run_cases.config(**WIDE, precision__backend=kind) for kind in ("te", "local")}
    settings["te"] = dataclasses.replace(
        settings["te"],
        precision=PrecisionConfig(backend="te", fp8=_with_head_out(Fp8Config(recipe="delayed"))),
    )
    with one_rank() as groups:
        bench, place = Bench(settings[writer], groups), run_cases.folder(tmp_path)
        te = bench if writer == "te" else Bench(settings["te"], groups)
        assert any(name.endswith("_extra_state") for name in te.model.state_dict())
        draw = torch.Generator().manual_seed(3)
        for part in parts(bench.chunks, bench.optimizer):  # no step can be computed here
            part.memory.normal_(generator=draw)
        run_cases.save(bench, place, 1)
        meta = find_resume(place, run_cases.IDENTITY).meta
        again = Bench(settings[reader], groups, resume=(place, meta))
        wanted, got = held(bench), held(again)
        assert wanted.keys() == got.keys()
        assert {key.split(".")[0] for key, _ in wanted} > {"language_model", "optimizer"}
        assert [key for key, x in wanted.items() if not torch.equal(x, got[key])] == []


@pytest.mark.parametrize("recipe", ["delayed", "current", "block", "mxfp8"])
def test_the_recipe_of_megatron_core_is_the_one_of_the_settings(recipe: str) -> None:
    from megatron.core.fp8_utils import get_fp8_recipe

    fp8 = Fp8Config(recipe=recipe, format="e4m3", margin=1, history=7, amax="most_recent")
    with one_rank() as groups:
        model = build(config(CASES["llama"], _with_head_out(fp8)), "te", groups)
        made = get_fp8_recipe(model.config)
    names = {"delayed": "TEDelayedScaling", "current": "Float8CurrentScaling"}
    names |= {"block": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling"}
    assert type(made).__name__ == names[recipe]
    assert made.fp8_format.name == "E4M3"
    if recipe == "delayed":
        assert (made.margin, made.amax_history_len, made.amax_compute_algo) == (1, 7, "most_recent")


def _with_head_out(fp8: Fp8Config) -> Fp8Config:
    """Without the linears whose widths are those of the vocabulary and of the codebooks."""
    out = ("*.heads.*", "*.output_layer", "*.code_projection", "projector.*")
    return dataclasses.replace(fp8, exclude=(*fp8.exclude, *out))


def test_what_is_kept_out_of_8_bits_is_and_the_rest_is_not() -> None:
    fp8 = _with_head_out(Fp8Config(recipe="current", exclude=("*.layers.0.self_attention.*",)))
    with one_rank() as groups:
        model = build(config(CASES["llama"], fp8), "te", groups)
    layers = model.language_model.decoder.layers
    assert not layers[0].self_attention.linear_qkv.forward.is_on
    assert layers[1].self_attention.linear_qkv.forward.is_on
    attention, mlp = model.visual_head.layers[1].attention, model.visual_head.layers[1].mlp
    te = importlib.import_module("megatron_asvr.precision.te")
    assert isinstance(attention.in_proj.fp8, te.Product)
    assert model.visual_head.heads[0].fp8 is None
    assert {slot.partition(".")[0] for slot in mlp.fp8} == {"w1", "w2"}
    kernels = {product.grouped for product in mlp.fp8.values()}
    assert len(kernels) == 2
    assert all(isinstance(kernel, te.GroupedProduct) for kernel in kernels)


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine rounds weights by our emulation, its own equal, for lack of a GPU."""
    module = importlib.import_module("transformer_engine.pytorch.tensor.float8_tensor")
    library = module.tex

    def rounded(x: Tensor, quantizer: Any, into: Any = None, _: Any = None) -> Any:
        made = quantize.by_tensor(x, quantize.E4M3)
        data, inverse = made.data_RC.view(torch.uint8), made.inverse.view(1)
        if into is not None:
            into._data.copy_(data)
            into._scale_inv.copy_(inverse)
            return into
        held = {"data": data, "fp8_scale_inv": inverse.clone(), "data_transpose": None}
        kind = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer, "device": x.device}
        return module.Float8Tensor(
            shape=x.shape, dtype=x.dtype, requires_grad=False, **held, **kind
        )

    class Library:
        quantize = staticmethod(rounded)

        def __getattr__(self, name: str) -> Any:
            return getattr(library, name)

    monkeypatch.setattr(module, "tex", Library())


def test_weights_in_8_bits_are_filled_saved_and_continued(
    rounding: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is one of plain numbers; the optimizer's weights are not rounded to 8 bits."""
    pretend(monkeypatch, "cpu")
    fp8 = _with_head_out(Fp8Config(recipe="current", weights=True))
    plain, kept = (
        run_cases.config(**WIDE, train__optim__distributed=True, precision__backend=kind)
        for kind in ("local", "te")
    )
    kept = dataclasses.replace(kept, precision=PrecisionConfig(backend="te", fp8=fp8))
    check_precision(kept)
    with one_rank() as groups:
        full, bench = Bench(plain, groups), Bench(kept, groups)
        exact = dict(full_state(full.chunks, groups=groups))
        got = dict(full_state(bench.chunks, groups=groups))
        assert got.keys() == exact.keys()
        rounded = {name for name, x in got.items() if not torch.equal(x, exact[name])}
        layers = [x.name for x in linears.linears(kept, run_cases.CODEBOOK_SIZES)]
        assert rounded == {f"{x}.weight" for x in layers if ".decoder.layers." in x}
        for name in rounded:
            torch.testing.assert_close(got[name], exact[name], rtol=2**-4, atol=1e-3)
        (wanted, mine) = held(full), held(bench)
        assert wanted.keys() == mine.keys()
        masters = [key for key in wanted if key[0].startswith("optimizer.state.param.")]
        assert len(masters) > len(rounded)
        assert [key for key in masters if not torch.equal(wanted[key], mine[key])] == []

        place = run_cases.folder(tmp_path)
        run_cases.save(bench, place, 1)
        meta = find_resume(place, run_cases.IDENTITY).meta
        for run in (kept, plain):
            again = Bench(
                dataclasses.replace(run, run=_other_seed(run)), groups, resume=(place, meta)
            )
            found = held(again)
            assert found.keys() == mine.keys()
            other = {key for key, x in mine.items() if not torch.equal(x, found[key])}
            # Rounded again, with a scale from numbers in bf16; until the next step.
            assert {key for key, _ in other} <= (rounded if run is kept else set())
            for key in other:
                torch.testing.assert_close(found[key], mine[key], rtol=2**-7, atol=0)


def _other_seed(run: Config) -> RunConfig:
    return dataclasses.replace(run.run, seed=run.run.seed + 1)


def test_the_guard_sees_every_linear_in_8_bits_and_can_turn_each_off() -> None:
    fp8 = _with_head_out(Fp8Config(recipe="current", exclude=("*.layers.0.self_attention.*",)))
    with one_rank() as groups:
        run = config(CASES["llama"], fp8)
        model = build(run, "te", groups)
        watched = model.watched
        decided = policy.decide(linears.linears(run, asvr_cases.SIZES), fp8)
        assert set(watched.products) == {name for name, kept in decided.items() if kept is None}
        one = "language_model.decoder.layers.1.mlp.linear_fc1"
        depth = "visual_head.layers.1.mlp.w1.0"
        watched.turn_off([one, depth])
        assert not model.language_model.decoder.layers[1].mlp.linear_fc1.forward.is_on
        slots = model.visual_head.layers[1].mlp.fp8
        assert slots["w1.0"].grouped is None
        assert slots["w1.1"].grouped is not None
        with watched.compared() as drifts:
            assert set(drifts) == set(watched.products) - {one, depth}
            assert slots["w1.1"].grouped is None  # each answers for itself


def test_modules_of_transformer_engine_take_weights_that_are_not_theirs() -> None:
    te = importlib.import_module("transformer_engine.pytorch")
    lend = importlib.import_module("megatron_asvr.precision.te")._lend
    weight = torch.nn.Parameter(torch.empty(3, 32, 16, device="meta", dtype=torch.bfloat16))
    grouped = te.GroupedLinear(3, 16, 32, bias=False, params_dtype=weight.dtype, device="meta")
    assert [tuple(x.shape) for x in grouped.parameters()] == [(32, 16)] * 3
    lend(grouped, **{f"weight{d}": x for d, x in enumerate(weight)})
    assert not list(grouped.parameters())
    assert grouped.weight1.data_ptr() == weight[1].data_ptr()
    assert grouped.weight1._base is weight


def test_what_megatron_core_takes_from_the_compiled_library_is_there() -> None:
    library = importlib.import_module("transformer_engine_torch")
    folder = Path(importlib.util.find_spec("megatron.core").origin).parent
    texts = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    used = {
        name
        for text in texts
        if "import transformer_engine_torch as tex" in text
        for name in re.findall(r"\btex\.(\w+)", text)
    }
    assert used
    assert {name for name in used if not hasattr(library, name)} == set()


def test_the_backend_is_chosen_with_a_reason() -> None:
    chosen = precision.select_backend(NoGpu("meta"), torch.bfloat16)
    assert chosen == ("te", "CUDA with Transformer Engine")


READERS = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "transformer_engine/**/*.py",
    "CUBLAS_WORKSPACE_CONFIG": "torch/lib/libtorch_cuda.so",  # cuBLAS hides its names
    "NCCL_ALGO": "nvidia/nccl/lib/libnccl.so.*",
    "NCCL_NVLS_ENABLE": "nvidia/nccl/lib/libnccl.so.*",
}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_library_reads_the_variable_that_is_set_for_it(name: str) -> None:
    site = Path(sysconfig.get_paths()["purelib"])
    assert any(name.encode() in file.read_bytes() for file in site.glob(READERS[name]))
