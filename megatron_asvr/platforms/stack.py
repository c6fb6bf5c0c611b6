"""What is installed here, against what is supported: ``asvr env``.

``ROWS`` is the table. A version that ``supported`` excludes is wrong where the row is needed; one
that differs from ``constraints.txt`` (the versions that belong together) is untested. What a
machine without a GPU cannot have is absent, which is not the same as right.
"""

import importlib.metadata
import importlib.resources
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_asvr.platforms import apex, gpus, kernels

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

State = Literal["ok", "untested", "absent", "WRONG"]
Found = tuple[str | None, str]  # version, or None and why there is none


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of the report.

    Attributes:
        name: of the part.
        state: what to think of it.
        found: its version; None: it is not there.
        note: what is wanted, or why it is not there.
    """

    name: str
    state: State
    found: str | None
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One part of the stack.

    Attributes:
        name: of the part.
        needed: on every machine, on one with GPUs, or nowhere.
        supported: versions that can work.
        pinned: its line in ``constraints.txt``; None: it has none.
        find: looks for it, without a CUDA context.
    """

    name: str
    needed: Literal["always", "gpu", "never"]
    supported: str
    pinned: str | None
    find: Callable[[], Found]


def pins() -> dict[str, str]:
    """The versions in ``constraints.txt`` that hold for this Python, by the package's name."""
    lines = importlib.resources.files(__package__).joinpath("constraints.txt").read_text("utf-8")
    found = {}
    for line in filter(None, (line.partition("#")[0].strip() for line in lines.splitlines())):
        one = Requirement(line)
        if one.marker is None or one.marker.evaluate():
            (spec,) = one.specifier
            found[one.name] = spec.version
    return found


def _package(name: str) -> Callable[[], Found]:
    def find() -> Found:
        try:
            return importlib.metadata.version(name), ""
        except importlib.metadata.PackageNotFoundError:
            return None, f"the package {name} is not installed"

    return find


def _driver() -> Found:
    found, why = gpus.look()
    return (found[0].driver, "") if found else (None, why)


def _cuda() -> Found:
    return torch.version.cuda, f"torch {torch.__version__} is built without CUDA"


def _cudnn() -> Found:
    if not torch.backends.cudnn.is_available():
        return None, "torch has none"
    number = int(torch.backends.cudnn.version() or 0)  # 92000 is 9.20.0
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}", ""


def _nccl() -> Found:
    if torch.version.cuda is None or not torch.distributed.is_nccl_available():
        return None, "torch has none"
    return ".".join(map(str, torch.cuda.nccl.version())), ""


ROWS = (
    Row(
        name="Python",
        needed="always",
        supported=">=3.11",
        pinned=None,
        find=lambda: (platform.python_version(), ""),
    ),
    Row(
        name="torch",
        needed="always",
        supported=">=2.6",
        pinned="torch",
        find=lambda: (torch.__version__, ""),
    ),
    Row(
        name="megatron-core",
        needed="always",
        supported=">=0.16,<0.20",
        pinned="megatron-core",
        find=_package("megatron-core"),
    ),
    Row(
        name="DALI",
        needed="always",
        supported=">=2.4,<3",
        pinned="nvidia-dali-cuda130",
        find=_package("nvidia-dali-cuda130"),
    ),
    Row(name="driver", needed="gpu", supported=">=580.65.06", pinned=None, find=_driver),
    Row(name="CUDA", needed="gpu", supported=">=13.0,<14", pinned="cuda-toolkit", find=_cuda),
    Row(name="NCCL", needed="gpu", supported=">=2.27", pinned="nvidia-nccl-cu13", find=_nccl),
    Row(name="cuDNN", needed="gpu", supported=">=9", pinned="nvidia-cudnn-cu13", find=_cudnn),
    Row(
        name="Transformer Engine",
        needed="never",
        supported=">=2.6",
        pinned="transformer-engine",
        find=_package("transformer-engine"),
    ),
    Row(
        name="its part for torch",
        needed="never",
        supported=">=2.6",
        pinned="transformer-engine-torch",
        find=_package("transformer-engine-torch"),
    ),
    Row(name="mpi4py", needed="never", supported=">=4", pinned=None, find=_package("mpi4py")),
)


def entries(*, gpu: bool) -> Iterator[Entry]:
    """Every line of the report.

    Args:
        gpu: what a GPU needs is needed here, whether or not one is seen.
    """
    pinned, seen = pins(), bool(gpus.look()[0])
    for row in ROWS:
        needed = row.needed == "always" or (row.needed == "gpu" and (gpu or seen))
        yield judge(row, row.find(), pinned.get(row.pinned or ""), needed=needed)
    usable, why = apex.detect()
    found = _package("apex")()[0] if usable else None
    yield Entry(name="apex", state="ok" if usable else "absent", found=found, note=why)
    library, why = kernels.load()
    yield Entry(name="C++ kernels", state="ok" if library else "absent", found=None, note=why)
    yield from _declared()


def judge(row: Row, found: Found, pin: str | None, *, needed: bool) -> Entry:
    """What to think of a part.

    Args:
        row: the part.
        found: what ``row.find`` gave.
        pin: the version that is pinned.
        needed: whether this machine has to have it.
    """
    version, why = found
    if version is None:
        note = f"{why}; wanted {row.supported}" if needed else why
        return Entry(name=row.name, state="WRONG" if needed else "absent", found=None, note=note)
    if not SpecifierSet(row.supported).contains(version, prereleases=True):
        note = f"supported are {row.supported}"
        state: State = "WRONG" if needed else "untested"
        return Entry(name=row.name, state=state, found=version, note=note)
    same = pin is None or _begins(pin, Version(version).public)
    note = "" if same else f"pinned is {pin}"
    return Entry(name=row.name, state="ok" if same else "untested", found=version, note=note)


def _begins(pin: str, version: str) -> bool:
    """Whether a library's own number, which may be shorter, is the pinned package's."""
    return f"{pin}.".startswith(f"{version}.")


def _declared() -> Iterator[Entry]:
    """One line for all packages that this one declares, and one for each that does not fit."""
    if _package("megatron_asvr")()[0] is None:
        note = "this package is on the path, but not installed: what it needs is not known"
        yield Entry(name="declared packages", state="WRONG", found=None, note=note)
        return
    declared = [Requirement(text) for text in importlib.metadata.requires("megatron_asvr") or ()]
    plain = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]
    judged = {row.pinned for row in ROWS}  # by their own lines, which tell supported from pinned
    wrong = []
    for one in plain:
        version, why = _package(one.name)()
        fits = one.name in judged or one.specifier.contains(version or "0", prereleases=True)
        if version is None or not fits:
            note = why if version is None else f"wanted {one.specifier}"
            wrong.append(Entry(name=one.name, state="WRONG", found=version, note=note))
    others = sorted(_other_dali())
    if others:
        note = f"a second build of DALI beside the declared one: pip uninstall {' '.join(others)}"
        wrong.append(
            Entry(name=others[0], state="WRONG", found=_package(others[0])()[0], note=note)
        )
    fit = f"{len(plain) - sum(e.name in {r.name for r in plain} for e in wrong)} of {len(plain)}"
    yield Entry(
        name="declared packages",
        state="WRONG" if wrong else "ok",
        found=fit,
        note="see below" if wrong else "as this package declares them",
    )
    yield from wrong


def _other_dali() -> set[str]:
    names = (one.metadata["Name"] or "" for one in importlib.metadata.distributions())
    found = {canonicalize_name(name) for name in names}
    return {n for n in found if re.fullmatch(r"nvidia-dali-cuda\d+", n)} - {"nvidia-dali-cuda130"}
