"""The container recipes agree with each other and with the pinned versions. None is built here."""

import re
import subprocess
from pathlib import Path

from megatron_asvr.platforms import stack

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {
    "Dockerfile": (r"^FROM (\S+)$", r"^COPY (.+) \S+$", r"^RUN (.+)$"),
    "asvr.def": (r"^From: (\S+)$", r"^    (\S+) /src/\S+$", r"^    (/src/\S+ /src)$"),
}


def found(name, what):
    text = (ROOT / "containers" / name).read_text(encoding="utf-8")
    return re.findall(RECIPES[name][what], text, re.MULTILINE)


def test_one_base_image_whose_cuda_is_the_pinned_one():
    bases = {base for name in RECIPES for base in found(name, 0)}
    (base,) = bases
    version = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-cudnn-devel-\w+", base)[1]
    assert stack.pins()["cuda-toolkit"].startswith(f"{version}.")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_copies_what_is_there_and_calls_the_script(name):
    copied = {path for line in found(name, 1) for path in line.split()}
    assert all((ROOT / path).exists() for path in copied)
    assert {"setup.py", "megatron_asvr", "containers/install.sh"} <= copied
    assert found(name, 2) == ["/src/containers/install.sh /src"]
    links = [path for path in (ROOT / "megatron_asvr").iterdir() if path.is_symlink()]
    assert all(link.resolve().relative_to(ROOT).parts[0] in copied for link in links)


def test_the_script_is_valid_and_pins_what_the_index_does_not_have():
    script = ROOT / "containers" / "install.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text(encoding="utf-8")
    assert re.search(r"^APEX_COMMIT=[0-9a-f]{40}$", text, re.MULTILINE)
    assert (ROOT / re.search(r'\$source/(\S+constraints\.txt)"', text)[1]).is_file()
    assert script.stat().st_mode & 0o111
