"""The choice of the platform, the shims' references, apex, and what a rank is told."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

from megatron_asvr.platforms import apex, choose, shims

import pytest
import torch

from megatron_asvr import platforms
from megatron_asvr.errors import ConfigError
from tests.language_cases import one_rank

MCORE = pathlib.Path(importlib.util.find_spec("megatron.core").origin).parent
VERSION = importlib.metadata.version("megatron-core")


@pytest.fixture
def fresh_choice():
    choose._selected.cache_clear()
    yield
    choose._selected.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
class TestSelect:
    def test_without_cuda_the_cpu_is_chosen_with_a_reason(self, monkeypatch):
        monkeypatch.delenv("ASVR_PLATFORM", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        platform, reason = platforms.select()
        assert (platform.name, platform.backend, str(platform.device)) == ("cpu", "gloo", "cpu")
        assert "CUDA" in reason
        assert platforms.select()[0] is platform

    def test_cuda_is_chosen_where_there_is_a_device(self, monkeypatch):
        monkeypatch.delenv("ASVR_PLATFORM", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        platform, reason = platforms.select()
        assert (platform.name, platform.backend) == ("cuda", "nccl")
        assert "2 CUDA" in reason

    def test_the_environment_forces_the_cpu(self, monkeypatch):
        monkeypatch.setenv("ASVR_PLATFORM", "cpu")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        platform, reason = platforms.select()
        assert platform.name == "cpu"
        assert "ASVR_PLATFORM" in reason

    def test_cuda_cannot_be_forced_where_there_is_none(self, monkeypatch):
        monkeypatch.setenv("ASVR_PLATFORM", "cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ConfigError, match="ASVR_PLATFORM=cuda"):
            platforms.select()

    def test_an_unknown_name_is_refused_with_the_choices(self, monkeypatch):
        monkeypatch.setenv("ASVR_PLATFORM", "tpu")
        with pytest.raises(ConfigError, match=r"'tpu'.*auto, cpu, cuda"):
            platforms.select()


class TestShims:
    def test_names_are_unique(self):
        names = [shim.name for shim in shims.SHIMS]
        assert len(set(names)) == len(names)

    @pytest.mark.skipif(
        VERSION.rpartition(".")[0] not in ("0.16", "0.19"),
        reason=f"the references are to megatron-core 0.16 and 0.19, not {VERSION}",
    )
    @pytest.mark.parametrize("shim", shims.SHIMS, ids=lambda shim: shim.name)
    def test_the_named_lines_need_it(self, shim):
        assert shim.needed_by
        for line in shim.needed_by:
            number = line.line_0_16 if VERSION.startswith("0.16") else line.line_0_19
            if number is None:
                assert not (MCORE / line.file).exists()
                continue
            text = (MCORE / line.file).read_text().splitlines()[number - 1]
            assert line.code in text, f"{line.file}:{number}: {text}"

    def test_importing_platforms_imports_no_megatron(self):
        code = "import sys, megatron_asvr.platforms; print('megatron' in sys.modules)"
        assert run_python(code) == "False"

    def test_inert_with_cuda(self):
        changed = json.loads(run_python(CHANGES.format(available=True)))
        assert changed == []

    def test_installed_without_cuda(self):
        changed = json.loads(run_python(CHANGES.format(available=False)))
        assert {"torch.cuda.Stream", "torch.Tensor.type", "torch.zeros"} <= set(changed)

    def test_too_late_is_an_error(self):
        code = """
import megatron.core
from megatron_asvr.errors import ConfigError
try:
    from megatron_asvr.platforms import mcore
except ConfigError as error:
    print(error)
"""
        if VERSION.startswith("0.19"):
            pytest.skip("0.19 cannot be imported without triton or the shims")
        assert "import megatron_asvr.platforms.mcore first" in run_python(code)


# Which attributes of torch the platform replaces while it prepares the process.
CHANGES = """
import json, sys, torch
torch.cuda.is_available = lambda: {available}
torch.cuda.device_count = lambda: 1
places = {{"torch": torch, "torch.cuda": torch.cuda, "torch.Tensor": torch.Tensor,
          "torch.nn.Module": torch.nn.Module, "torch.cuda.random": torch.cuda.random}}
before = {{f"{{p}}.{{n}}": v for p, o in places.items() for n, v in vars(o).items()}}
from megatron_asvr import platforms
platforms.select()[0].prepare()
after = {{f"{{p}}.{{n}}": v for p, o in places.items() for n, v in vars(o).items()}}
print(json.dumps([n for n in after if after[n] is not before.get(n)]))
"""


def run_python(code: str, **env: str) -> str:
    environment = {**os.environ, **env}
    environment.pop("ASVR_PLATFORM", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class TestApex:
    def test_absent(self, monkeypatch):
        monkeypatch.setattr(sys, "path", [p for p in sys.path if not has_apex(p)])
        monkeypatch.delitem(sys.modules, "apex", raising=False)
        importlib.invalidate_caches()
        assert apex.detect() == (False, "not installed (optional)")

    def test_the_package_of_that_name_on_pypi_is_named_and_not_used(self, monkeypatch, tmp_path):
        write_package(tmp_path, "apex/__init__.py", "apex/models.py", "apex/views.py")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "apex", raising=False)
        usable, reason = apex.detect()
        assert not usable
        assert "Pyramid" in reason
        assert str(tmp_path) in reason
        monkeypatch.setitem(sys.modules, "apex", None)
        apex.block()
        with pytest.raises(ImportError):
            importlib.import_module("apex")
        assert apex.detect() == (False, "blocked by megatron_asvr")

    def test_nvidias_is_recognised(self, monkeypatch, tmp_path):
        write_package(tmp_path, *(f"apex/{n}__init__.py" for n in NVIDIA_PARTS))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "apex", raising=False)
        usable, reason = apex.detect()
        assert usable
        assert reason.startswith("NVIDIA's apex in")
        assert reason.endswith("with no amp_C, no fused_weight_gradient_mlp_cuda")
        write_package(tmp_path, "amp_C.py", "fused_weight_gradient_mlp_cuda.py")
        importlib.invalidate_caches()
        assert apex.detect()[1].endswith("with amp_C, fused_weight_gradient_mlp_cuda")
        assert all(apex.compiled_parts().values())

    def test_with_cuda_only_the_wrong_one_is_blocked(self, tmp_path):
        write_package(tmp_path, "apex/__init__.py", "apex/models.py")
        code = CHANGES.format(available=True) + "\nprint(sys.modules['apex'])"
        assert run_python(code, PYTHONPATH=str(tmp_path)).endswith("None")


NVIDIA_PARTS = ("", "optimizers/", "multi_tensor_apply/")


def has_apex(folder: str) -> bool:
    return pathlib.Path(folder or ".", "apex").is_dir()


def write_package(root: pathlib.Path, *files: str) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    importlib.invalidate_caches()


class TestCpu:
    def test_peak_memory_grows_with_use(self):
        platform = choose.CpuPlatform()
        before = platform.peak_memory_bytes()
        assert before > 50 * 2**20  # torch alone
        size = before // 4  # floats: as much again as all memory used so far
        torch.ones(size)
        assert platform.peak_memory_bytes() > before + size


def test_freed_memory_is_kept():
    code = """
import torch
from megatron_asvr.platforms.cpu import keep_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

before = resident()
pieces = [torch.ones(2**20, 5) for _ in range(8)]  # 5,120 pages each
del pieces
given_back = resident() - before
assert keep_memory()
pieces = [torch.ones(2**20, 5) for _ in range(8)]
del pieces
print(given_back, resident() - before)
"""
    given_back, kept = map(int, run_python(code).split())
    assert given_back < 2 * 5120
    assert kept > 7 * 5120


def test_a_lone_rank_copies_nothing_and_others_are_served():
    from megatron.core.distributed import param_and_grad_buffer as buffers

    with one_rank() as groups:
        settings = {"group": groups.world, "async_op": False}
        for collective in (buffers.dist_reduce_scatter_func, buffers.dist_all_gather_func):
            x, y = torch.arange(4.0), torch.zeros(4)
            collective(x, x, **settings)
            assert x.tolist() == [0.0, 1.0, 2.0, 3.0]
            collective(y, x, **settings)
            assert torch.equal(x, y)
