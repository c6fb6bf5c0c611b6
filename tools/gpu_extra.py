"""Ask the package index whether the GPU stack of constraints.txt resolves; nothing is installed.

`pip install --dry-run` of this package with its extra "gpu", wheels only, on this machine's Python
(which must be on Linux x86_64 for the answer to mean anything). One package is left out of that:
Transformer Engine's part for torch exists only as a source distribution whose metadata cannot be
made without CUDA. That its pinned version is there, and is the one that Transformer Engine wants,
is asked separately.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import stack

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "megatron_asvr" / "platforms" / "constraints.txt"
COMPILED = "transformer-engine-torch"  # where it is installed
LIMIT_S = 300


def wanted() -> list[str]:
    """What setup.py declares for GPUs, without the extra that names ``COMPILED``."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and _name(n) == "setup")
    given = {k.arg: k.value for k in call.keywords}
    extra = ast.literal_eval(given["extras_require"])["gpu"]
    plain = [re.sub(r",?pytorch\b", "", text) for text in extra]
    return [*ast.literal_eval(given["install_requires"]), *plain]


def _name(call: ast.Call) -> str:
    return getattr(call.func, "id", "")


def faults(installed: Sequence[Mapping[str, Any]], pins: Mapping[str, str]) -> list[str]:
    """What is wrong with a resolution.

    Args:
        installed: the part ``install`` of pip's report.
        pins: the versions of ``constraints.txt``.
    """
    found = {canonicalize_name(one["metadata"]["name"]): one["metadata"] for one in installed}
    wrong = []
    for name, version in pins.items():
        if name == COMPILED:
            continue
        if name not in found:
            wrong.append(f"{name}=={version} is pinned, but nothing wants it any more")
        elif found[name]["version"] != version:
            wrong.append(f"{name}: pinned {version}, resolved {found[name]['version']}")
    cuda = {match[1] for name in found if (match := re.search(r"-cu(?:da)?(\d{2})\d?$", name))}
    if len(cuda) != 1:
        wrong.append(f"packages of {len(cuda)} CUDA versions: {', '.join(sorted(cuda))}")
    engine = found.get("transformer-engine", {}).get("requires_dist", [])
    parts = {canonicalize_name(r.name): r for r in map(Requirement, engine)}
    if COMPILED not in parts or not parts[COMPILED].specifier.contains(pins[COMPILED]):
        told = parts.get(COMPILED)
        wrong.append(f"{COMPILED}: pinned {pins[COMPILED]}, Transformer Engine wants {told}")
    return wrong


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        raise SystemExit(f"pip {arguments[0]} fails:\n{done.stderr.strip()}")
    return done.stdout


def main() -> None:
    """Resolve, compare, and exit with what is wrong."""
    pins = stack.pins()
    flags = ["--dry-run", "--ignore-installed", "--only-binary", ":all:", "--quiet"]
    report = ["--report", "-", "--constraint", str(CONSTRAINTS)]
    installed = json.loads(_pip("install", *flags, *report, *wanted()))["install"]
    wrong = faults(installed, pins)
    there = re.findall(r"[\w.]+", _pip("index", "versions", COMPILED).partition("versions:")[2])
    if pins[COMPILED] not in there:
        wrong.append(f"{COMPILED}=={pins[COMPILED]} is not in the index")
    if wrong:
        raise SystemExit("the GPU stack does not fit together:\n" + "\n".join(wrong))
    print(f"{len(installed)} packages of the GPU stack fit together:")
    print(", ".join(f"{name} {version}" for name, version in pins.items()))


if __name__ == "__main__":
    main()
