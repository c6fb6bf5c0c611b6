"""The probes of the ledger: that they can run, can fail, and are never passed without a GPU."""

import dataclasses
import itertools

from megatron_asvr.platforms import select
from megatron_asvr.platforms.ledger import ROWS

import pytest
import torch

from megatron_asvr.launch import probes, smoke

SMALL = {
    "gemm_rate": (64,),
    "pinned_copy": (1,),
    "memory": (1,),
    "write_speed": (1,),
    "decode": (2,),
}
FUNCTIONS = [name for name, probe in smoke.PROBES.items() if probe.settings is None]
OF_RANKS = {"all_reduce", "all_reduce_nodes"}  # tests/world/test_smoke.py
UNFIT = {
    "te_linear": "Transformer Engine needs CUDA",
    "te_attention": "Transformer Engine needs CUDA",
    "fp8_linear": "Transformer Engine needs CUDA",
    "fused_gradient": "the platform is cpu",
}


def test_every_probe_of_the_ledger_is_known_and_every_other_is_not() -> None:
    named = [probe for row in ROWS for probe in row.probes]
    assert sorted(named) == sorted(smoke.PROBES)
    assert all(callable(getattr(probes, name)) for name in FUNCTIONS)


@pytest.mark.parametrize("name", sorted({*FUNCTIONS} - OF_RANKS - {*UNFIT}))
def test_a_probe_agrees_with_itself_on_the_cpu(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = getattr(probes, name)(*SMALL.get(name, ()))
    assert found.ok, found
    assert found.measured
    assert found.expected


@pytest.mark.parametrize("name", UNFIT)
def test_without_what_it_looks_at_a_probe_says_so(name: str) -> None:
    with pytest.raises(probes.UnfitError, match=UNFIT[name]):
        getattr(probes, name)()


@pytest.mark.parametrize("name", ["norm", "attention", "loss", "adam"])
def test_a_probe_of_other_numbers_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, plain = itertools.count(), probes._numbers
    monkeypatch.setattr(probes, "_numbers", lambda *shape, seed=0: plain(*shape, seed=next(seeds)))
    assert not getattr(probes, name)().ok


def test_numbers_that_are_none_are_not_near() -> None:
    wrong = torch.tensor([1.0, float("nan")])
    assert not probes._near(wrong, torch.ones(2), 1.0).ok
    assert not probes._near(torch.ones(2), wrong, 1.0).ok


@pytest.mark.parametrize(
    ("name", "state", "said"),
    [
        ("norm", "PASS", "2"),
        ("attention", "FAIL", "2"),
        ("te_linear", "NOT RUN", "no Transformer Engine"),
        ("loss", "FAIL", "ended with status 1: Xid 79: the GPU has fallen off the bus"),
        ("adam", "FAIL", "took too long"),
        ("seeded", "FAIL", "wrote no answer"),
    ],
)
def test_however_a_probe_ends_its_result_says_so(name: str, state: str, said: str) -> None:
    timeout_s = 1.0 if name == "adam" else 60.0
    result = smoke.run("a row", name, timeout_s, module="tests.planted_probes")
    assert (result.state, result.row, result.probe) == (state, "a row", name)
    assert result.measured.startswith(said)
    assert bool(result.action) == (state != "PASS")


def states(monkeypatch: pytest.MonkeyPatch, num_gpus: int, **how: object) -> dict[str, str]:
    """Of all probes on a machine with so many GPUs; those that would run are RAN."""

    class Machine:
        pass

    Machine.num_gpus = num_gpus
    monkeypatch.setattr(smoke, "select", lambda: (Machine(), "made up"))

    def ran(row: str, name: str, *_: object) -> smoke.Result:
        return smoke.Result(row=row, probe=name, level="gpu", state="FAIL", measured="RAN")

    monkeypatch.setattr(smoke, "run", ran)
    monkeypatch.setattr(smoke, "_certificate", ran)
    found = list(smoke.smoke(**how))
    assert len(found) == len(smoke.PROBES)
    return {r.probe: r.measured if r.state == "FAIL" else r.state for r in found}


def ran(found: dict[str, str]) -> set[str]:
    return {smoke.PROBES[name].level for name, state in found.items() if state == "RAN"}


def test_what_is_run_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(states(monkeypatch, 0)) == {"host"}
    assert ran(states(monkeypatch, 1)) == {"host", "gpu"}
    assert ran(states(monkeypatch, 8)) == {"host", "gpu", "node"}
    assert ran(states(monkeypatch, 8, nodes=2)) == {"nodes"}
    assert ran(states(monkeypatch, 0, nodes=2)) == set()
    assert states(monkeypatch, 8)["tensor_certificate"] == "NOT RUN"
    assert states(monkeypatch, 8, config="run.yaml")["tensor_certificate"] == "RAN"


def test_results_are_plain_values() -> None:
    (first, *_) = smoke.smoke(nodes=2)
    assert dataclasses.asdict(first)["state"] == "NOT RUN"
    assert select()[0].num_gpus == 0
