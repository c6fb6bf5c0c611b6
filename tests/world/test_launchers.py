"""A run is the same whoever starts its ranks: `asvr train --nproc`, torchrun, or mpiexec."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_asvr.config.load import to_dict
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
