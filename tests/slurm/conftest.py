"""One cluster of real daemons for all tests here, and a run that nothing disturbed."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.run_data import make_files
from tests.slurm.cluster import Cluster, missing, started
from tests.slurm.jobs import finished, submit, write_config


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if (why := missing()) is not None:
        if "slurm" in os.environ.get("ASVR_REQUIRE", ""):
            pytest.fail(why)
        pytest.skip(why)
    # Not below pytest's own folder: munge wants everybody to be able to reach its socket.
    with tempfile.TemporaryDirectory(prefix="asvr-slurm-") as folder, started(Path(folder)) as made:
        yield made


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("jobs") / "files")


@pytest.fixture(scope="session")
def undisturbed(cluster, files, tmp_path_factory) -> Path:
    """The folder of a run on two nodes, two tensor-parallel ranks, that has finished."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    submit(write_config(files, run))
    finished(run)
    return run


@pytest.fixture
def nodes(cluster) -> Iterator[Cluster]:
    """The cluster, whose nodes may be disturbed."""
    yield cluster
    cluster.restore()
