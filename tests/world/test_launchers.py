"""A run is the same whoever starts its ranks: `asvr train --nproc`, torchrun, or mpiexec."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_asvr.config.load import to_dict
from megatron_asvr.errors import LaunchError
from megatron_asvr.launch.rank import Place, open_store
from tests.run_data import make_files, run_config
from tests.unit.data_corpus import MPIEXEC

ROOT = Path(__file__).resolve().parents[2]
ASVR = ["-m", "megatron_asvr"]
LAUNCHERS = {
    "nproc": [sys.executable, *ASVR],
    "torchrun": [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *ASVR,
    ],
    "mpi": [str(MPIEXEC), "-n", "2", sys.executable, "-m", "mpi4py", *ASVR],
}

pytestmark = [
    pytest.mark.world,
    pytest.mark.slow,
    pytest.mark.skipif(MPIEXEC is None, reason="needs mpiexec: pip install mpi4py mpich"),
]


def call(launcher, *arguments):
    return subprocess.run(
        [*LAUNCHERS[launcher], *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("launchers") / "files")


def write_config(files, tmp_path):
    path = tmp_path / "run.yaml"
    config = run_config(files, tmp_path / "run", train__steps=2, train__global_batch=4)
    path.write_text(yaml.safe_dump(to_dict(config)))
    return path


def test_three_launchers_train_the_same_weights(files, tmp_path):
    config = write_config(files, tmp_path)
    ended = {}
    for launcher in LAUNCHERS:
        run = tmp_path / launcher
        own = ["--nproc", "2"] if launcher == "nproc" else []
        done = call(launcher, "train", config, f"run.dir={run}", *own)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"run: {run}") == 1, done.stdout  # by one of the ranks
        (step,) = (run / "checkpoints").glob("*2")
        shards = sorted(p for p in step.rglob("*.safetensors")) or sorted(step.rglob("*.distcp"))
        assert shards
        ended[launcher] = {p.name: p.read_bytes() for p in shards}
    assert ended["torchrun"] == ended["nproc"]
    assert ended["mpi"] == ended["nproc"]


@pytest.mark.parametrize("launcher", ["torchrun", "mpi"])
def test_an_error_is_shown_once(files, tmp_path, launcher):
    config = write_config(files, tmp_path)
    done = call(launcher, "train", config, "parallel.tp=2", "model.language.num_heads=1")
    assert done.returncode != 0
    assert done.stderr.count("asvr train: ConfigError: ") == 1, done.stderr
    if launcher == "mpi":
        assert "Traceback" not in done.stderr


def test_a_preflight_by_the_launcher_of_the_run(tmp_path):
    small = ["--folder", tmp_path, "--write-mib", "1"]
    done = call("torchrun", "preflight", *small, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # from one of the ranks
    assert report["ok"]
    assert report["rows"][0][2] == "2 of 2 answered, on 1 nodes"
    done = call("mpi", "preflight", *small, "--min-gb-s", "1e9")
    assert done.returncode != 0
    assert done.stderr.count("asvr preflight: LaunchError: these nodes must not start") == 1


def test_a_first_node_that_is_gone_is_named(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(closed.getsockname()[1]))
        here = Place(launcher="torchrun", rank=1, world_size=2, local_rank=1)
        with pytest.raises(LaunchError, match=r"does not reach rank 0 at 127\.0\.0\.1:"):
            open_store(here, 1.0)
