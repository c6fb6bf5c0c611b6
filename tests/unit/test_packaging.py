"""What setup.py declares: the right megatron-core for each Python, and nothing missing."""

import ast
import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import megatron_asvr
from megatron_asvr.config.load import PRESETS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_asvr"
SETUP = {
    keyword.arg: keyword.value
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"
    for keyword in node.keywords
}
REQUIRED = [Requirement(text) for text in ast.literal_eval(SETUP["install_requires"])]
EXTRAS = {
    extra: [Requirement(text) for text in texts]
    for extra, texts in ast.literal_eval(SETUP["extras_require"]).items()
}

# Import names that differ from the name of their distribution.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "easy_vqa": "easy-vqa",
    "lmms_eval": "lmms-eval",
    "megatron": "megatron-core",
    "nvidia": "nvidia-dali-cuda130",
    "transformer_engine": "transformer-engine",
    "yaml": "pyyaml",
}


def applying(python_version: str) -> dict[str, Requirement]:
    """Requirements that hold for one version of Python."""
    environment = {"python_version": python_version, "python_full_version": f"{python_version}.0"}
    return {
        requirement.name: requirement
        for requirement in REQUIRED
        if requirement.marker is None or requirement.marker.evaluate(environment)
    }


@pytest.mark.parametrize(
    ("python_version", "megatron_core"),
    [("3.11", "0.16.1"), ("3.12", "0.19.2"), ("3.13", "0.19.2")],
)
def test_megatron_core_follows_python(python_version, megatron_core):
    assert str(applying(python_version)["megatron-core"].specifier) == f"=={megatron_core}"


def test_one_requirement_a_package_and_python():
    for python_version in ("3.11", "3.12", "3.13"):
        assert len(applying(python_version)) == len({r.name for r in REQUIRED})


def test_python_versions():
    allowed = SpecifierSet(ast.literal_eval(SETUP["python_requires"]))
    assert "3.11.0" in allowed
    assert "3.12.0" in allowed
    assert "3.10.14" not in allowed


def test_what_is_installed_satisfies_what_is_declared():
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name, requirement in applying(running).items():
        assert importlib.metadata.version(name) in requirement.specifier, name


def test_version_is_said_once():
    assert ast.literal_eval(SETUP["version"]) == megatron_asvr.__version__
    assert f"[{megatron_asvr.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_command_exists():
    (script,) = ast.literal_eval(SETUP["entry_points"])["console_scripts"]
    module, function = re.fullmatch(r"asvr=([\w.]+):(\w+)", script).groups()
    assert callable(getattr(importlib.import_module(module), function))


def test_every_import_is_declared():
    declared = {r.name.lower() for group in (REQUIRED, *EXTRAS.values()) for r in group}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            else:
                continue
            for top in {module.split(".")[0] for module in modules}:
                if top not in sys.stdlib_module_names and top != "megatron_asvr":
                    assert DISTRIBUTIONS.get(top, top) in declared, f"{path}: {top}"


def test_every_folder_and_file_is_packaged():
    data = ast.literal_eval(SETUP["package_data"])["megatron_asvr"]
    packaged = {path for pattern in data for path in PACKAGE.glob(pattern)}
    for path in PACKAGE.rglob("*"):
        if path.is_dir() or "__pycache__" in path.parts:
            continue
        if path.suffix == ".py":
            assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"
        else:
            assert path in packaged, f"{path} is not in package_data"


@pytest.mark.slow
def test_pip_installs_a_copy_of_the_repository(tmp_path):
    """``pip install .``, up to the installation itself: its requirements, and what it builds."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "megatron_asvr", copy / "megatron_asvr")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip"]
    # Without isolation nothing is downloaded: what it needs is here.
    flags = ["--no-build-isolation", "--disable-pip-version-check"]
    run = partial(subprocess.run, cwd=copy, capture_output=True, text=True, check=True)
    assert (
        f"Would install megatron_asvr-{megatron_asvr.__version__}"
        in run([*pip, "install", "--dry-run", *flags, "."]).stdout
    )
    run([*pip, "wheel", "--no-deps", *flags, "--wheel-dir", str(tmp_path), "."])
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as built:
        names = set(built.namelist())
    presets = {f"megatron_asvr/config/presets/{path.name}" for path in PRESETS.glob("*.yaml")}
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "megatron_asvr").rglob("*.py")}
    assert presets | modules <= names


def test_transformer_engine_is_built_at_the_declared_version():
    (pin,) = (r for r in EXTRAS["gpu"] if r.name == "transformer-engine")
    script = (ROOT / "tools/build_te_cpu.sh").read_text(encoding="utf-8")
    assert str(pin.specifier) == "==" + re.search(r"TE=\$\{TE:-([\d.]+)\}", script)[1]
