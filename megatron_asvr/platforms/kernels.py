"""Small kernels in C++ for the CPU, built where a compiler is found, and torch's way where not.

``kernels.cpp`` is compiled when it is first wanted, to a file in ``~/.cache/megatron_asvr/kernels``
whose name tells source, compiler and CPU, and whose end is a checksum of the rest. It is written
beside and then renamed, so any number of ranks may start at once. Only what nobody else could have
written is loaded. Every kernel has a twin in torch, in
the module that calls it, which is used for all else: other devices and types, and where
``use`` said why there are none.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform as machine
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_asvr.platforms.choose import select

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILERS = ("g++", "c++", "clang++")
# No flag lets the compiler suppose that all numbers are finite.
FLAGS = [
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno"),
    *("-fno-trapping-math", "-std=c++17", "-fopenmp", "-shared", "-fPIC"),
]
BUILD_TIMEOUT_S = 120
_SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_CHECKSUM = hashlib.sha256().digest_size
_library: ctypes.CDLL | None = None
_are_used, _reason = False, "nothing asked for them"


def use(wanted: bool) -> tuple[bool, str]:
    """Whether kernels are used in this process from here on, and why; a warning where none can be.

    Args:
        wanted: ``precision.kernels``; they are built if need be.
    """
    global _library, _are_used, _reason
    platform = select()[0].name
    if not wanted:
        _library, _reason = None, "precision.kernels=false"
    elif platform != "cpu":
        _library, _reason = None, f"the platform is {platform}"
    else:
        _library, _reason = load()
    _are_used = _library is not None
    if wanted and platform == "cpu" and not _are_used:
        logger.warning("no C++ kernels, torch's own operations instead: %s", _reason)
    return _are_used, _reason


def decided() -> tuple[bool, str]:
    """What the last ``use`` came to."""
    return _are_used, _reason


@contextlib.contextmanager
def imagined(are_used: bool) -> Iterator[None]:
    """Inside, kernels count as used or not, whatever can be built: for tensors without memory."""
    global _are_used
    before, _are_used = _are_used, are_used
    try:
        yield
    finally:
        _are_used = before


def fit(*tensors: Tensor) -> bool:
    """Whether kernels are used for tensors: all on the CPU, of one type, and outside compilers."""
    return (
        _are_used
        and {x.dtype for x in tensors} in ({torch.float32}, {torch.bfloat16})
        and all(x.device.type == "cpu" for x in tensors)
        and not torch.compiler.is_compiling()
    )


def call(name: str, tensors: list[Tensor], *numbers: float) -> None:
    """Run a kernel; of fake tensors nothing is computed.

    Args:
        name: of the kernel, without the type of its first tensor.
        tensors: contiguous.
        numbers: those after them; whole ones are sizes.
    """
    if any(isinstance(x, FakeTensor) for x in tensors):
        return
    assert all(x.is_contiguous() for x in tensors), name
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
    values = [ctypes.c_int64(x) if isinstance(x, int) else ctypes.c_float(x) for x in numbers]
    kernel = getattr(_library, f"{name}_{_SUFFIX[tensors[0].dtype]}")
    kernel.restype = None
    kernel(*pointers, *values, ctypes.c_int(torch.get_num_threads()))


def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, built unless it lies in the cache, and where it is; or None and why."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None, f"no compiler: none of {', '.join(COMPILERS)} is on PATH"
    try:
        folder = _folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(folder):
            return None, f"others may write to {folder}; remove it, or run chmod go-w on it"
        path = folder / f"kernels-{_fingerprint(compiler)}.so"
        if not _is_whole(path):
            _build(compiler, path)
        return ctypes.CDLL(str(path)), f"built by {compiler}, {path}"
    except subprocess.CalledProcessError as error:
        words = (error.stderr or error.stdout or "").strip().splitlines() or ["without a word"]
        return None, f"{compiler} failed: {words[0]}"
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        return None, f"they cannot be built or loaded: {error}"


def _folder() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "megatron_asvr" / "kernels"


def _is_ours(path: Path) -> bool:
    """Whether this user alone can have written to a file or a folder."""
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _fingerprint(compiler: str) -> str:
    """Of all that decides what the compiler writes, and on which CPU it can run."""
    version = _run([compiler, "--version"])
    return hashlib.sha256(
        "\0".join([SOURCE.read_text("utf-8"), compiler, version, *FLAGS, _cpu()]).encode()
    ).hexdigest()[:20]


@functools.cache
def _cpu() -> str:
    """What tells this machine's kind of CPU from others."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        kinds = ("vendor_id", "cpu family", "model", "flags", "Features")
        return "".join(sorted({line for line in file if line.startswith(kinds)}))
    return f"{machine.machine()} {machine.processor()}"


def _is_whole(path: Path) -> bool:
    """Whether a file of ours ends with its checksum; a damaged library may kill us."""
    if not (path.exists() and _is_ours(path)):
        return False
    found = path.read_bytes()
    return hashlib.sha256(found[:-_CHECKSUM]).digest() == found[-_CHECKSUM:]


def _build(compiler: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        _run([compiler, *FLAGS, str(SOURCE), "-o", str(made)])
        with made.open("ab") as file:
            file.write(hashlib.sha256(made.read_bytes()).digest())
        made.chmod(0o700)
        made.replace(path)


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S
    ).stdout
