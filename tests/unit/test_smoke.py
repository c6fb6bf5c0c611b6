"""The probes of the ledger: that they can run, can fail, and are never passed without a GPU."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence

from megatron_asvr.platforms import select
from megatron_asvr.platforms.ledger import ROWS

import pytest
import torch

from megatron_asvr.config.load import save
from megatron_asvr.data.dali.pipeline import ImageDecoder
from megatron_asvr.launch import probe, probes, probes_of_runs, smoke
from megatron_asvr.launch.probe import FUNCTIONS
from tests.run_data import make_files, run_config

SMALL = {
    "gemm_rate": (64,),
    "pinned_copy": (1,),
    "memory": (1,),
    "write_speed": (1,),
    "decode": (2,),
}
OF_RANKS = {"all_reduce", "all_reduce_nodes", "tensor_certificate", "pipeline_certificate"}
UNFIT = {
    "te_linear": "Transformer Engine needs CUDA",
    "te_attention": "Transformer Engine needs CUDA",
    "fp8_linear": "Transformer Engine needs CUDA",
    "fused_gradient": "on a CPU our own products do so",
}


def test_every_probe_of_the_ledger_is_known_and_every_other_is_not() -> None:
    named = [name for row in ROWS for name in row.probes]
    assert sorted(named) == sorted(smoke.PROBES)
    assert {*smoke.PROBES} <= {*FUNCTIONS}


@pytest.mark.parametrize("name", sorted({*smoke.PROBES} - OF_RANKS - {*UNFIT, "token_flips"}))
def test_a_probe_agrees_with_itself_on_the_cpu(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = FUNCTIONS[name](*SMALL.get(name, ()))
    assert found.ok, found
    assert found.measured
    assert found.expected


@pytest.mark.parametrize("name", UNFIT)
def test_without_what_it_looks_at_a_probe_says_so(name: str) -> None:
    with pytest.raises(probes.UnfitError, match=UNFIT[name]):
        getattr(probes, name)()


@pytest.mark.parametrize("name", ["norm", "remade_input", "attention", "loss", "adam"])
def test_a_probe_of_other_numbers_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds, plain = itertools.count(), probes._numbers
    monkeypatch.setattr(probes, "_numbers", lambda *shape, seed=0: plain(*shape, seed=next(seeds)))
    assert not getattr(probes, name)().ok


def test_token_flips_are_those_of_the_runs_images(tmp_path, monkeypatch) -> None:
    run = run_config(make_files(tmp_path / "files"), tmp_path / "run")
    asked = dataclasses.replace(run, data=dataclasses.replace(run.data, parity_max_flip=(0.01,)))
    same = probes_of_runs.token_flips(asked)
    assert same == probes.Found(
        ok=True, measured="12 png: 0.00% 0.00% 0.00%", expected="at most 0.01"
    )
    plain = ImageDecoder.views
    monkeypatch.setattr(ImageDecoder, "views", inverted(plain))
    assert not probes_of_runs.token_flips(asked).ok
    monkeypatch.setattr(ImageDecoder, "views", inverted(plain))
    save(run, tmp_path / "run.yaml")
    probe.main("token_flips", str(tmp_path / "found"), str(tmp_path / "run.yaml"))
    unasked = json.loads((tmp_path / "found").read_text())
    assert unasked["ok"]
    assert "0.00%" not in unasked["measured"]
    assert unasked["expected"] == "data.parity_max_flip is unset"
    with pytest.raises(probes.UnfitError, match="no visual loss"):
        probes_of_runs.token_flips(
            dataclasses.replace(run, loss=dataclasses.replace(run.loss, visual_weight=0.0))
        )


def test_a_layout_that_a_run_cannot_have_is_no_failure(tmp_path) -> None:
    run = run_config(tmp_path, tmp_path / "run", model__language__num_layers=1)
    with pytest.raises(probes.UnfitError, match=r"parallel\.pp=2"):
        probes_of_runs.pipeline_certificate(run)


def inverted(plain: Callable[..., list[torch.Tensor]]) -> Callable[..., list[torch.Tensor]]:
    """The first of two decoders gives other pixels than the second."""
    seen: list[object] = []

    def views(self: object, encoded: Sequence[bytes]) -> list[torch.Tensor]:
        seen.append(self)
        found = plain(self, encoded)
        return [255 - x for x in found] if self is seen[0] else found

    return views


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
    found = smoke.call(name, timeout_s=timeout_s, module="tests.planted_probes")
    assert found["state"] == state
    assert found["measured"].startswith(said)


def states(monkeypatch: pytest.MonkeyPatch, num_gpus: int, **how: object) -> dict[str, str]:
    """Of all probes on a machine with so many GPUs; those that would run fail, as SAID."""

    class Machine:
        pass

    Machine.num_gpus = num_gpus
    monkeypatch.setattr(smoke, "select", lambda: (Machine(), "made up"))

    def failed(*_: object, **__: object) -> dict[str, str]:
        return {"state": "FAIL", "measured": "SAID"}

    monkeypatch.setattr(smoke, "call", failed)
    found = list(smoke.smoke(**how))
    assert len(found) == len(smoke.PROBES)
    assert all(result.action for result in found)
    levels = [list(smoke.LEVELS).index(result.level) for result in found]
    assert levels == sorted(levels)
    return {r.probe: r.state for r in found}


def ran(found: dict[str, str]) -> set[str]:
    return {smoke.PROBES[name].level for name, state in found.items() if state == "FAIL"}


def test_what_is_run_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(states(monkeypatch, 0)) == {"host"}
    assert ran(states(monkeypatch, 1)) == {"host", "gpu"}
    assert ran(states(monkeypatch, 8)) == {"host", "gpu", "node"}
    assert ran(states(monkeypatch, 8, nodes=2)) == {"nodes"}
    assert ran(states(monkeypatch, 0, nodes=2)) == set()
    of_run = {name for name, probe in smoke.PROBES.items() if probe.of_run}
    for config, state in ((None, "NOT RUN"), ("run.yaml", "FAIL")):
        found = states(monkeypatch, 8, config=config)
        assert {found[name] for name in of_run} == {state}


def test_results_are_plain_values() -> None:
    (first, *_) = smoke.smoke(nodes=2)
    assert dataclasses.asdict(first)["state"] == "NOT RUN"
    assert select()[0].num_gpus == 0
