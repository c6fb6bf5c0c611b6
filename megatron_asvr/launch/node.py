"""What one rank can tell of its node before a run: software, GPUs, storage, data."""

import hashlib
import importlib.metadata
import os
import platform
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import gpus

import megatron_asvr
from megatron_asvr.config.load import load
from megatron_asvr.config.schema import PARTS, Config
from megatron_asvr.data import locations
from megatron_asvr.data.formats import data_files, source_format
from megatron_asvr.errors import AsvrError
from megatron_asvr.launch.rank import Place

MARK = "mark"  # file that rank 0 writes into the folder of the test
MIB = 2**20
_SEEN_S = 5.0  # for what another node has written to be visible here


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What a preflight looks at, the same for every rank.

    Attributes:
        config: file or preset; None: no data is looked at.
        overrides: settings that win over the file's.
        folder: on shared storage; None: the run's, or without a configuration the working folder.
        write_mib: size of the file that every node writes there.
    """

    config: str | None = None
    overrides: tuple[str, ...] = ()
    folder: str | None = None
    write_mib: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What one rank found.

    Attributes:
        rank: in the world.
        node: name of its machine.
        python: version.
        code: hash of this package's files.
        packages: version of every installed package.
        gpus: names of the node's GPUs.
        folder: where it looked for shared storage.
        write_mb_s: speed of writing there, of the first rank of a node.
        files: number and bytes of the data's files.
        problems: what is wrong by itself, by the name of the check.
    """

    rank: int
    node: str
    python: str
    code: str
    packages: dict[str, str]
    gpus: list[str]
    folder: str
    write_mb_s: float | None = None
    files: list[int] | None = None
    problems: dict[str, str] = field(default_factory=dict)


def node_name() -> str:
    """This machine's name, as Slurm knows it where it started this process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def look(here: Place, wish: Wish, mark: str) -> Facts:
    """What this rank sees.

    Args:
        here: its place.
        wish: what to look at.
        mark: name of the folder that rank 0 made for this test, and content of the file in it.
    """
    problems: dict[str, str] = {}
    config = _config(wish, problems)
    files = _files(config, problems) if config is not None else None
    folder = test_folder(wish, config)
    speed = _shared(folder / mark, mark, here, wish.write_mib, problems)
    return Facts(
        rank=here.rank,
        node=node_name(),
        python=platform.python_version(),
        code=_code(),
        packages=_packages(),
        gpus=_gpus(here, problems),
        folder=str(folder),
        write_mb_s=speed,
        files=files,
        problems=problems,
    )


def read_config(wish: Wish) -> Config | None:
    """The configuration that is asked for.

    Raises:
        ConfigError: it cannot be read, or a setting is wrong.
    """
    return None if wish.config is None else load(wish.config, wish.overrides)


def test_folder(wish: Wish, config: Config | None) -> Path:
    """Where shared storage is looked for."""
    return Path(wish.folder or (config.run.dir if config is not None else ".")).absolute()


def _config(wish: Wish, problems: dict[str, str]) -> Config | None:
    try:
        return read_config(wish)
    except AsvrError as error:
        problems["data"] = str(error)
        return None


def _code() -> str:
    """Hash of every Python file of this package."""
    root = Path(megatron_asvr.__file__).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def _packages() -> dict[str, str]:
    """The version that an import would get: the first on the path wins."""
    found: dict[str, str] = {}
    for one in importlib.metadata.distributions():
        found.setdefault(one.metadata["Name"].lower().replace("_", "-"), one.version)
    return dict(sorted(found.items()))


def _gpus(here: Place, problems: dict[str, str]) -> list[str]:
    found, why = gpus.look()
    troubles = [gpu.trouble for gpu in found if gpu.trouble]
    wanted = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if wanted.isdecimal() and int(wanted) > len(found):
        troubles.append(f"Slurm gave {wanted} GPUs, seen are {len(found)} ({why})")
    if "has not answered" in why or "failed" in why:
        troubles.append(why)
    if troubles and here.local_rank == 0:
        problems["gpus"] = "; ".join(troubles)
    return [gpu.name for gpu in found]


def _shared(
    folder: Path, mark: str, here: Place, write_mib: int, problems: dict[str, str]
) -> float | None:
    """Megabytes a second, written by the first rank of a node; every rank looks for the mark."""
    until = time.monotonic() + _SEEN_S
    while not _holds(folder / MARK, mark):
        if time.monotonic() > until:
            problems["folder"] = (
                f"{folder.parent} is not shared: what rank 0 has written there is not to be seen"
            )
            return None
        time.sleep(0.1)
    if here.local_rank:
        return None
    block, path = os.urandom(MIB), folder / f"rank_{here.rank}"
    try:
        start = time.perf_counter()
        with open(path, "wb") as stream:
            for _ in range(write_mib):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        return write_mib * MIB / 1e6 / (time.perf_counter() - start)
    except OSError as error:
        problems["folder"] = f"{folder.parent} cannot be written: {error.strerror or error}"
        return None


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except OSError:
        return False


def _files(config: Config, problems: dict[str, str]) -> list[int] | None:
    """Number and bytes of everything the run reads; the first thing that cannot be is a problem."""
    number = size = 0
    name = ""
    try:
        for name in _names(config):
            if not locations.is_url(name) and os.path.isdir(name):
                number += sum(1 for _ in os.scandir(name))
                continue
            number, size = number + 1, size + locations.state(name)[0]
            with locations.open_file(name) as stream:
                stream.read(4096)
    except (OSError, AsvrError) as error:
        shown: Any = getattr(error, "strerror", None) or error
        problems["data"] = f"{name} cannot be read: {shown}"
        return None
    return [number, size]


def _names(config: Config) -> list[str]:
    """Files and folders of data, tokenizers and weights."""
    names = []
    for source in (*config.data.train, *config.data.eval):
        names += data_files(source)
        if source.images is not None and source_format(source) in ("json", "jsonl"):
            names.append(source.images)
    names += filter(None, (config.model.text_tokenizer, config.model.visual_tokenizer))
    origins = {config.init.source(part) for part in PARTS}
    return names + sorted(filter(None, origins))
