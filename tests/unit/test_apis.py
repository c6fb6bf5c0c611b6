"""What we take from megatron-core, Transformer Engine, DALI and torch.distributed is there.

Read from the sources of the pinned versions, so that code which only a GPU runs is held against
them too. `make test-apis` fetches what is not installed.
"""

import importlib.util
import sys
import sysconfig
from functools import cache
from pathlib import Path

import pytest

from tests.apis import Reader, Sources
from tests.conftest import MCORE19, TE_SOURCES
from tests.optional_imports import Import, optional_imports
from tests.unit.test_packaging import EXTRAS

pytestmark = pytest.mark.apis

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_asvr"
OURS = ("megatron.core", "nvidia.dali", "torch.distributed", "transformer_engine")
CORES = ("installed", "0.19.2")
TE = next(iter(EXTRAS["gpu"][0].specifier)).version

# Names that megatron-core looks for in Transformer Engine and goes on without.
LOST = {
    # Queries, keys and values are split by torch.split: their gradients are then concatenated by
    # torch, one copy more for each layer and backward pass. No version from 2.8 on exports it.
    "transformer_engine.pytorch.attention._SplitAlongDim",
    # 0.16.1 loses `te_general_gemm` with it, which only its router uses; ours does not
    # (precision/routing.py). 0.19.2 asks because versions before 2.10 need it.
    "transformer_engine.pytorch.module.base.get_workspace",
}

# Calls of megatron-core that do not bind, and why we can live with each.
REFUSED = {
    # Its own recipe for delayed scaling: a pydantic dataclass, which drops the unknown
    # `override_linear_precision` without a word, so fp8_wgrad=False would do nothing.
    ("extensions/transformer_engine.py", "DelayedScaling"),
    # Experts over NCCL's own exchange (moe_flex_dispatcher_backend="ncclep").
    ("transformer/moe/fused_a2a.py", "ep_bootstrap"),
    # CUDA graphs of FP8 layers; the other side of a question about the version.
    ("transformer/cuda_graphs.py", "add_fp8_tensors_to_global_buffer"),
}

# Packages that megatron-core uses where they are, by what it does without them.
WITHOUT = {
    "other optimizers than Adam": "emerging_optimizers",
    "other kinds of layers": "causal_conv1d fla mamba_ssm fast_hadamard_transform tilelang",
    "attention of its own; ours is Transformer Engine's": (
        "flash_attn flash_attn_3 flash_mla flashattn_hopper nvidia_kitchen cudnn"
    ),
    "experts with other kernels and exchanges": "deep_ep grouped_gemm",
    "gradients added in the kernel (platforms/apex.py)": "fused_weight_gradient_mlp_cuda apex",
    "serving, export, moving weights between layouts": (
        "flashinfer flashinfer_cubin flashinfer_jit_cache flask flask_restful hypercorn quart "
        "orjson msgpack zmq tensorrt_llm modelopt torch_memory_saver cuda cupy nvshmem nixl"
    ),
    "data sets, tokenizers and models of its own": "boto3 botocore tiktoken wget omegaconf",
    "other storage and restarts": "multistorageclient nvidia_resiliency_ext",
    "measuring and messages": "absl pynvml nvtx",
    "held against the built library by `make test-te`": "transformer_engine_torch",
    "comes with torch for CUDA": "triton",
}


@cache
def sources(core: str, packages: tuple[str, ...] = OURS) -> Sources:
    spec = importlib.util.find_spec("megatron.core")
    installed = Path(spec.origin).parents[2]
    first = MCORE19 if core == "0.19.2" else installed
    return Sources([first, TE_SOURCES, Path(sysconfig.get_paths()["purelib"])], packages)


def test_the_sources_are_of_the_pinned_version():
    assert (TE_SOURCES / f"transformer_engine-{TE}.dist-info").is_dir()


@pytest.mark.parametrize("core", CORES)
def test_every_name_exists_and_every_call_binds(core):
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}: {problem}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, problem in Reader(path.read_text(encoding="utf-8"), sources(core)).problems()
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "from transformer_engine.common.recipe import DelayedScaling\nDelayedScaling(margi=1)",
            "unexpected keyword argument 'margi'",
        ),
        (
            "import transformer_engine.pytorch as te\nte.GroupedLinear(2, 8, 8, biass=True)",
            "unexpected keyword argument 'biass'",
        ),
        (
            "import transformer_engine.pytorch as te\nte.Linear(8)",
            "missing a required argument: 'out_features'",
        ),
        ("import transformer_engine.pytorch as te\nte.Linea", "no transformer_engine.pytorch.Line"),
        (
            "from megatron.core.extensions.transformer_engine import TEDotProductAttention as A\n"
            "class B(A):\n    def forward(self):\n        super().forward(1, 2, 3, 4, 5, bia=6)",
            "unexpected keyword argument 'bia'",
        ),
        (
            "from megatron.core.transformer.transformer_config import TransformerConfig as T\n"
            "def width(config: T): return config.hidden_width",
            "no megatron.core.transformer.transformer_config.TransformerConfig.hidden_width",
        ),
        (
            "from megatron.core.transformer.transformer_config import TransformerConfig as T\n"
            "T(num_layers=1, fp8_recipes='x')",
            "unexpected keyword argument 'fp8_recipes'",
        ),
        ("from nvidia.dali import fn\nfn.resize(0, antialiased=1)", "'antialiased'"),
        ("import torch.distributed as d\nd.init_process_group('nccl', device=1)", "'device'"),
    ],
)
def test_a_planted_mistake_is_found(text, problem):
    found = list(Reader(text, sources("installed")).problems())
    assert len(found) == 1
    assert problem in found[0][1]


@cache
def optional(core: str) -> tuple[Import, ...]:
    readable = sources(core, ("megatron", "transformer_engine"))
    return tuple(optional_imports(readable.folder("megatron.core"), readable, TE))


@pytest.mark.parametrize("core", CORES)
def test_what_megatron_core_silently_does_without_is_accepted_by_name(core):
    lost = {found.name for found in optional(core) if found.is_there is False}
    assert lost == LOST


@pytest.mark.parametrize("core", CORES)
def test_packages_that_megatron_core_can_do_without_are_installed_or_accepted(core):
    accepted = {name for names in WITHOUT.values() for name in names.split()}
    wanted = {found.name.split(".")[0] for found in optional(core) if found.is_there is None}
    wanted -= sys.stdlib_module_names
    missing = {name for name in wanted if importlib.util.find_spec(name) is None}
    assert missing - accepted == set()


def test_every_accepted_package_is_one_that_megatron_core_looks_for():
    accepted = {name for names in WITHOUT.values() for name in names.split()}
    assert accepted <= {found.name.split(".")[0] for core in CORES for found in optional(core)}


@pytest.mark.parametrize("core", CORES)
def test_megatron_cores_own_calls_bind_to_transformer_engine(core):
    readable = sources(core, ("transformer_engine",))
    folder = readable.folder("megatron.core")
    refused = set()
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "transformer_engine" in text:
            for _, problem in Reader(text, readable).problems():
                if "argument" in problem:
                    name = problem.partition(":")[0].rpartition(".")[2]
                    refused.add((path.relative_to(folder).as_posix(), name))
    assert refused <= REFUSED
