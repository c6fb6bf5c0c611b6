"""Five optimizer steps on real data are those of one process, in every layout; see tests/matrix.py.

The one process runs unpacked, one sample at a time, without recomputation.
"""

import functools
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron)

import pytest
import torch

from megatron_asvr.config.schema import Config
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.parallel.groups import Groups, destroy
from megatron_asvr.train.assemble import make_groups, open_data
from megatron_asvr.train.caches import fill_caches
from tests.matrix import DEFAULT, LAYOUTS, MIXES, case_config, make_files, rows
from tests.run_cases import Bench, assert_same_gradients

pytestmark = pytest.mark.world

STEPS = 5
Result = dict[str, Any]


def run_cases(cases: list[Config]) -> list[Result]:
    """What the steps of each run gave."""
    found = []
    for config in cases:
        groups = make_groups(config)
        found.append(steps(config, groups))
        destroy()
    return found


def steps(config: Config, groups: Groups) -> Result:
    """Losses, counts and gradient norms of all steps, and the first step's gradients."""
    with closing(open_data(config, groups=groups)) as data:
        fill_caches(data, groups=groups)
        bench = Bench(config, groups)
        found: Result = {"losses": [], "norms": [], "totals": []}
        for step in range(STEPS):
            batches = data.train.step(step)
            if step == 0:
                found["grads"] = bench.gradients(batches)
            result = bench.step(step, batches)
            found["losses"].append(result.loss)
            found["norms"].append(result.grad_norm)
            found["totals"].append(result.totals)
        return found


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return make_files(tmp_path_factory.mktemp("matrix") / "files")


def experts(layout: str) -> str:
    return "experts" if "ep" in LAYOUTS[layout] else "dense"


@functools.cache
def expected(
    files: Path, mix: str, target_shift: int, model: str, kind: str, **more: Any
) -> Result:
    """The one process."""
    options = {**DEFAULT, "mix": mix, "target_shift": target_shift, "model": model, "kind": kind}
    return run_ranks(run_cases, ([case_config(files, {}, options, **more)],), 1, timeout_s=200)[0]


def on_layout(files: Path, layout: str, cases: list[dict[str, Any]], **more: Any) -> list[Result]:
    degrees = LAYOUTS[layout]
    world = 1
    for name in ("tp", "pp", "cp", "dp"):
        world *= degrees.get(name, 1)
    configs = [
        case_config(files, degrees, {**options, "kind": experts(layout)}, **more)
        for options in cases
    ]
    return run_ranks(run_cases, (configs,), world, timeout_s=400)


def assert_same(got: Result, want: Result, what: str) -> None:
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-6), what
    assert got["norms"] == pytest.approx(want["norms"], rel=1e-6), what
    assert_same_gradients(got["grads"], want["grads"], what)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_options_take_the_steps_of_one_process(files, layout):
    cases = [dict(case.options) for case in rows() if case.layout == layout]
    for options, got in zip(cases, on_layout(files, layout, cases), strict=True):
        common = (options[name] for name in ("mix", "target_shift", "model"))
        assert_same(got, expected(files, *common, experts(layout)), f"{layout}, {options}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_stays_near(files, layout):
    (got,) = on_layout(files, layout, [DEFAULT], train__precision="bf16")
    common = (DEFAULT[name] for name in ("mix", "target_shift", "model"))
    want = expected(files, *common, experts(layout), train__precision="bf16")
    assert got["losses"] == pytest.approx(want["losses"], rel=5e-3)
    ours, theirs = (torch.cat([g.flatten() for g in x["grads"].values()]) for x in (got, want))
    assert torch.cosine_similarity(ours, theirs, dim=0) >= 0.999


@pytest.mark.parametrize("layout", ["pp2_vpp2", "tp2_sp_cp2"])
def test_a_batch_without_images_trains_on_text(files, layout):
    """And one without text on images: the mix ``no_captions``."""
    assert not set("cnmq") & set(MIXES["no_images"])
    (got,) = on_layout(files, layout, [{**DEFAULT, "mix": "no_images"}])
    assert_same(got, expected(files, "no_images", 0, "trained", "dense"), layout)
    assert all(totals[3:].sum() == 0 for totals in got["totals"])
