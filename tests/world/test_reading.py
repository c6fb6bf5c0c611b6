"""Each file of weights is read by one rank, however many there are; and what then goes wrong."""

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import CheckpointError, LaunchError
from megatron_asvr.hf.imported import write_imported
from megatron_asvr.hf.importer import read_folder
from megatron_asvr.hf.run import export_run
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.model.sharding import full_state
from megatron_asvr.parallel import groups as process_groups
from megatron_asvr.parallel.collectives import checked_sizes, gather_objects
from megatron_asvr.parallel.stored import Stored, compose, open_safetensors, read_shared
from megatron_asvr.train.assemble import make_groups, open_data
from megatron_asvr.train.loop import train
from megatron_asvr.train.start import start
from tests.run_data import make_files, run_config

pytestmark = pytest.mark.world

SMALL = {"train__global_batch": 4, "train__micro_batch": 1, "data__eval": [], "train__steps": 2}


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="asvr-reading-")  # removed when this process ends


@functools.cache
def files() -> Path:
    return make_files(Path(scratch().name) / "files", images=4)


@functools.cache
def trained() -> Config:
    """A run of two ranks with a checkpoint, frozen weights, its export, and that as an import."""
    folder = Path(scratch().name)
    changes = {**SMALL, "train__trainable": ["projector", "visual_head"]}
    config = run_config(files(), folder / "run", parallel__tp=2, **changes)
    run_ranks(train, (config,), 2, timeout_s=240)
    export_run(config.run.dir, str(folder / "hf"))
    write_imported(read_folder(folder / "hf"), folder / "imported", max_shard_bytes=15_000)
    return run_config(files(), folder / "run", **changes)


@contextlib.contextmanager
def opens(folders: list[Path]) -> Iterator[Counter[str]]:
    """Count inside how often this process opens each file of the folders."""
    found: Counter[str] = Counter()
    places, active = tuple(f"{folder}{os.sep}" for folder in folders), [True]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and active and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(args[0]))
            if path.startswith(places) and not os.path.isdir(path):
                found[path] += 1

    sys.addaudithook(hook)  # stays until the process ends
    yield found
    active.clear()


def started(configs: list[Config], folders: list[Path]) -> list[tuple[Counter[str], str]]:
    """Opens of all ranks and a hash of all weights, after the start of each run."""
    found = []
    for config in configs:
        with opens(folders) as mine:
            groups = make_groups(config)
            with contextlib.closing(open_data(config, groups=groups)) as data:
                chunks = start(config, data, begun_s=0.0, groups=groups).chunks
        digest = hashlib.sha256()
        for name, x in full_state(chunks, groups=groups):
            digest.update(name.encode() + x.contiguous().view(torch.uint8).numpy().tobytes())
        total = sum(gather_objects(mine, group=groups.world), Counter())
        found.append((total, digest.hexdigest()))
        process_groups.destroy()
    return found


def test_opens_do_not_grow_with_the_data_parallel_size() -> None:
    again, folder = trained(), Path(scratch().name)
    run, hf, imported = RunFolder(folder / "run"), folder / "hf", folder / "imported"
    folders = [run.checkpoints, run.frozen, hf, imported, files() / "visual"]
    results = []
    for dp in (1, 2, 4):
        sources = {
            "init__all": str(imported),
            "init__vision_encoder": str(hf),
            "init__projector": str(run.root),
        }
        fresh = run_config(files(), folder / f"fresh_{dp}", **SMALL, **sources)
        results.append(run_ranks(started, ([fresh, again], folders), dp, timeout_s=240))
    (new, first), (resumed, second) = results[0]
    assert results[1] == results[0]
    assert results[2] == results[0]
    assert first == second  # the sources are the run's own weights
    files_of = {
        2: [*run.step(2).glob("*.distcp"), files() / "visual" / "tokenizer.safetensors"],
        3: list(run.frozen.glob("*.safetensors")),  # its checksum, its header, its tensors
    }
    assert [len(paths) for paths in files_of.values()] == [3, 2]
    for number, paths in files_of.items():
        assert {resumed[str(path)] for path in paths} == {number}
    shards = list(imported.glob("*.safetensors"))
    assert len(shards) > 4
    assert max(new[str(path)] for path in [*shards, hf / "model.safetensors"]) == 2


def shared(folder: str, bad: str | None) -> list[str]:
    """What each rank gets from three files, of which one may be unreadable on its rank."""
    weights = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found = open_safetensors(path, CheckpointError)
        weights |= {f"{path.stem}.{name}": x for name, x in found.items()}
    parts = [weights[f"{file}.x"] for file in "abc"]
    fill = functools.partial(fill_sum, parts)
    weights["sum"] = compose(parts[0].shape, parts[0].dtype, fill, parts, sum_of)
    if bad is not None:
        x = weights[bad]
        weights[bad] = Stored(x.shape, x.dtype, unreadable, x.file)
    with checked_sizes():
        found = {
            name: x.clone() for name, x in read_shared(weights, weights, group=dist.group.WORLD)
        }
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name].read()) for name in weights)
    assert all(found[name].dtype == weights[name].dtype for name in weights)
    forms = sorted((name, tuple(x.shape)) for name, x in found.items())
    assert gather_objects(forms, group=dist.group.WORLD) == [forms] * dist.get_world_size()
    return sorted(found)


def unreadable(out: torch.Tensor, start: int) -> None:
    """As a disk that fails."""
    Path("/nowhere/at/all").read_bytes()


def fill_sum(parts: list[Stored], out: torch.Tensor, start: int) -> None:
    out.copy_(sum_of([x.read() for x in parts]).view(-1)[start : start + out.numel()])


def sum_of(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] + 2 * parts[1] + 3 * parts[2]


@pytest.fixture(scope="module")
def three_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    generator = torch.Generator().manual_seed(0)
    for number, file in enumerate("abc"):
        tensors = {
            "x": torch.randn(3, 5, generator=generator),
            "scalar": torch.tensor(number),
            "none": torch.zeros(0, 4),
            "odd": torch.arange(7, dtype=torch.uint8),
            "half": torch.randn(9, generator=generator).bfloat16(),
        }
        save_file(tensors, folder / f"{file}.safetensors")
    return folder


@pytest.mark.parametrize("world", [2, 4])
def test_tensors_of_any_type_and_of_several_files_arrive(world: int, three_files: Path) -> None:
    assert len(run_ranks(shared, (str(three_files), None), world, timeout_s=60)) == 16


@pytest.mark.parametrize("bad", ["a.x", "c.half"])
def test_what_one_rank_cannot_read_is_an_error_of_all(bad: str, three_files: Path) -> None:
    everywhere = run_ranks(reasons, (str(three_files), bad), 3, timeout_s=60)
    assert len(everywhere) == 3
    assert len(set(everywhere)) == 1
    assert "safetensors cannot be read: FileNotFoundError" in everywhere[0]


def reasons(folder: str, bad: str) -> list[str]:
    """The error of every rank."""
    with pytest.raises(CheckpointError) as problem:
        shared(folder, bad)
    return gather_objects(str(problem.value), group=dist.group.WORLD)


def test_a_damaged_source_stops_a_start_on_all_ranks() -> None:
    folder = Path(scratch().name)
    trained()
    copy = folder / "damaged"
    write_imported(read_folder(folder / "hf"), copy, max_shard_bytes=15_000)
    shard = sorted(copy.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    config = run_config(files(), folder / "never", **SMALL, init__all=str(copy))
    with pytest.raises(LaunchError, match=r"ConversionError: .*not a complete safetensors file"):
        run_ranks(train, (config,), 2, timeout_s=60)
