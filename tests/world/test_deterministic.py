"""train.deterministic sets its switches in every rank, before anything of a GPU library starts."""

import os

from megatron_asvr.platforms.deterministic import VARIABLES

import pytest
import torch
import yaml

from megatron_asvr.cli.main import main
from megatron_asvr.config.load import to_dict
from megatron_asvr.config.schema import LanguageConfig
from megatron_asvr.errors import ConfigError, LaunchError
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.model.megatron_config import transformer_config
from megatron_asvr.parallel.collectives import gather_objects
from megatron_asvr.parallel.plan import ParallelPlan
from tests.run_data import make_files, run_config

pytestmark = pytest.mark.world


def seen():
    config = transformer_config(LanguageConfig(num_layers=1), ParallelPlan(world=2), torch.float32)
    found = {name: os.environ.get(name) for name in VARIABLES}
    switches = (torch.are_deterministic_algorithms_enabled(), config.deterministic_mode)
    return gather_objects((found, switches), group=torch.distributed.group.WORLD)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_every_rank_has_the_switches(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    wanted = {name: value for name, (value, _) in VARIABLES.items()}
    wanted["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"  # as good, so the user's stays
    assert run_ranks(seen, (), 2, deterministic=True) == [(wanted, (True, True))] * 2


def test_without_the_setting_nothing_is_touched():
    assert run_ranks(seen, (), 2) == [(dict.fromkeys(VARIABLES), (False, False))] * 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1"),
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0"),
        ("NCCL_ALGO", "NVLS"),
        ("NCCL_NVLS_ENABLE", "1"),
    ],
)
def test_a_variable_that_contradicts_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError) as failed:
        run_ranks(seen, (), 2, deterministic=True)
    assert isinstance(failed.value.__cause__, ConfigError)
    assert f"{name}={value!r}" in str(failed.value.__cause__)


def test_a_run_trains_with_it(tmp_path, monkeypatch, capsys):
    """No operator of ours lacks a deterministic form."""
    files = make_files(tmp_path / "files")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(run_config(files, tmp_path / "run", train__steps=2))))
    ended = []
    for run in (tmp_path / "first", tmp_path / "second"):
        settings = [f"run.dir={run}", "train.deterministic=true"]
        assert main(["train", str(path), *settings]) == 0
        (step,) = (run / "checkpoints").glob("*2")
        ended.append([p.read_bytes() for p in sorted(step.rglob("*.distcp"))])
    assert ended[0] == ended[1]
    assert ended[0]
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    assert main(["train", str(path), "train.deterministic=true", f"run.dir={tmp_path / 'x'}"]) == 1
    assert "asvr train: ConfigError: train.deterministic=true, but" in capsys.readouterr().err
