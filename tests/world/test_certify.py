"""`asvr certify` on a small real data set: layouts pass, planted faults fail and are named."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch.distributed as dist

from megatron_asvr.cli.certify import with_layout
from megatron_asvr.cli.main import main
from megatron_asvr.config.load import save
from megatron_asvr.data.loader import Loader
from megatron_asvr.launch import local
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.model import layers, visual_head
from megatron_asvr.train import certify as certification
from megatron_asvr.train import step
from megatron_asvr.train.certify import Certificate, Facts, Request, certify
from megatron_asvr.train.step import agree
from tests.run_data import make_files, run_config

pytestmark = pytest.mark.world

SETTINGS = ("samples", "collectives", "prepare", "shrink")
SMALL = {"train__micro_batch": 1, "data__codes": "online"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("certify") / "files")


def ask(files, layout: str, *, fault: str | None = None, **changes: Any) -> Certificate:
    """The certificate of a layout, whose ranks have a fault."""
    settings = {key: changes.pop(key) for key in SETTINGS if key in changes}
    config, dp = with_layout(run_config(files, files / "run", **{**SMALL, **changes}), layout)

    def start(fn: Callable[..., Facts], args: Sequence[Any], world: int) -> Facts:
        if world > 1 and fault is not None:
            return run_ranks(faulty, (fault, fn, args), world, timeout_s=240)
        return run_ranks(fn, args, world, timeout_s=240)

    return certify(Request(config=config, dp=dp, **settings), start)


# --- faults, planted in the ranks of the layout


def faulty(fault: str, fn: Callable[..., Facts], args: Sequence[Any]) -> Facts:
    """What ``fn`` finds in a rank with a fault."""
    FAULTS[fault]()
    return fn(*args)


def local_count() -> None:
    """The second data-parallel rank divides its text loss by its own number of targets."""

    def counted(batches, *, stop, groups):
        found = agree(batches, stop=stop, groups=groups)
        own = sum(batch.num_text_targets for batch in batches)
        return dataclasses.replace(found, text_count=own) if groups.dp_rank == 1 else found

    certification.agree = counted


def shuffled_code() -> None:
    """The second data-parallel rank exchanges the codes of the last two patches of an image."""
    read = Loader.step

    def shuffled(self, step):
        batches = read(self, step)
        if dist.get_rank() == 1:
            batch = next(b for b in batches if b.num_images)
            batch.codes_PD[[-1, -2]] = batch.codes_PD[[-2, -1]]
        return batches

    Loader.step = shuffled


def dropped_reduction() -> None:
    """The attention of the visual head does not sum the gradient of its input over the ranks."""
    forward = visual_head.DepthAttention.forward

    def unsummed(self, x_DME):
        visual_head.enter = lambda x, tp: x
        try:
            return forward(self, x_DME)
        finally:
            visual_head.enter = layers.enter

    visual_head.DepthAttention.forward = unsummed


def another_shape() -> None:
    """The second rank sends its sums in another shape, which gloo does not mind."""
    reduce = step.all_reduce_sum

    def reshaped(x, *, group):
        return reduce(x[None], group=group)[0] if dist.get_rank() == 1 else reduce(x, group=group)

    step.all_reduce_sum = reshaped


FAULTS = {f.__name__: f for f in (local_count, shuffled_code, dropped_reduction, another_shape)}


# --- certificates


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("tp=2,cp=2,sp=true", {"data__packing": True, "collectives": True}),
        (
            "pp=2,dp=2",
            {
                "train__trainable": ["vision_encoder", "projector", "language_model"],
                "loss__target_shift": 1,
                "collectives": True,
            },
        ),
        (
            "pp=2,vpp=2",
            {
                "model__language__num_layers": 8,
                "shrink": True,
                "train__recompute": "full",
                "train__recompute_visual_head": True,
            },
        ),
    ],
)
def test_layouts_pass(files, layout, changes):
    found = ask(files, layout, **changes)
    rows = {row.name: row for row in found.verdict.rows}
    assert found.verdict.ok, found.verdict
    assert not found.verdict.places
    assert rows["visual targets"].layout > 0
    # Measured over these layouts: outputs 3e-6, gradients 5e-7.
    assert rows["outputs of modules"].difference < 2e-5
    assert rows["worst gradient"].difference < 5e-6
    if changes.get("collectives"):
        assert rows["collectives"].layout > 0


def test_a_wrong_denominator_is_named(files):
    verdict = ask(files, "dp=2", fault="local_count").verdict
    rows = {row.name: row for row in verdict.rows}
    assert not verdict.ok
    assert rows["outputs of modules"].ok
    assert not rows["loss"].ok
    assert (
        "wrong denominator of the text loss: rank 1 (tp 0, pp 0, cp 0, dp 1) divides by"
        in (verdict.places[0])
    )


def test_a_shuffled_code_is_named(files):
    found = ask(files, "dp=2", fault="shuffled_code", samples=8, data__codes="cache", prepare=True)
    assert not found.verdict.ok
    (place,) = found.verdict.places
    assert "the first output that differs is target codes (sample q" in place


def test_a_dropped_reduction_is_named(files):
    verdict = ask(files, "tp=2", fault="dropped_reduction").verdict
    rows = {row.name: row for row in verdict.rows}
    assert not verdict.ok
    assert rows["outputs of modules"].ok
    (place,) = verdict.places
    assert "of the backward pass is visual_head.layers.0.norm1.weight" in place


def test_a_difference_in_collectives_is_named(files):
    assert ask(files, "dp=2", fault="another_shape").verdict.ok
    verdict = ask(files, "dp=2", fault="another_shape", collectives=True).verdict
    assert not verdict.ok
    (place,) = verdict.places
    assert "group [0, 1], collective" in place
    assert "rank 1: allreduce of float64 [(1, 11)]" in place


# --- the command


def test_the_command_prints_json_or_a_table_and_its_status_is_the_verdict(
    files, tmp_path, capsys, monkeypatch
):
    save(
        run_config(files, tmp_path / "run", data__cache_dir=str(tmp_path / "codes")), tmp_path / "c"
    )
    command = ["certify", str(tmp_path / "c"), "--layout", "dp=2", "--shrink"]
    assert main([*command, "--json", "-"]) == 1
    assert "add --prepare" in capsys.readouterr().err
    assert main([*command, "--json", "-", "--prepare"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True

    def planted(fn, args, world, **settings):
        call = (faulty, ("local_count", fn, args)) if world > 1 else (fn, args)
        return run_ranks(*call, world, **settings)

    monkeypatch.setattr(local, "run_ranks", planted)
    assert main([*command, "--json", str(tmp_path / "out" / "report.json")]) == 1
    assert capsys.readouterr().out.endswith("FAIL\n")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "wrong denominator" in report["places"][0]
