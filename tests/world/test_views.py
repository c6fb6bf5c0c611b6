"""Steps on pictures cut into tiles are those of one process; cached codes are the online ones."""

from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron)

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_asvr.config.schema import Config
from megatron_asvr.launch.local import run_ranks
from tests.matrix import DEFAULT, LAYOUTS, case_config, make_files
from tests.world.test_matrix import assert_same, run_cases

pytestmark = pytest.mark.world

SIZES = [(16, 16), (12, 60), (70, 20), (40, 44), (9, 200), (24, 50)]
RESOLUTION = {
    "mode": "anyres",
    "grids": [[1, 2], [2, 1], [2, 2], [1, 3]],
    "newline": True,
    "unpad": True,
}
LAYOUT_NAMES = ("tp2_sp_cp2", "pp2_dp2")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The matrix's samples, about pictures of several sizes."""
    folder = make_files(tmp_path_factory.mktemp("views") / "files")
    generator = np.random.default_rng(3)
    for number in range(24):
        pixels = generator.integers(0, 255, (*SIZES[number % len(SIZES)], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    return folder


def run(files: Path, layout: dict[str, int], resolution: dict[str, Any], **more: Any) -> Config:
    options = {**DEFAULT, "packing": True, "micro_batch": 2, **more.pop("options", {})}
    settings = {"model__resolution": resolution, "data__max_length": 144, **more}
    return case_config(files, layout, options, **settings)


def test_layouts_take_the_steps_of_one_process(files):
    shifted = {"target_shift": 1}
    one = {"packing": False, "micro_batch": 1}
    plain = {"mode": "anyres"}
    alone = [
        run(files, {}, RESOLUTION, options=one),
        run(files, {}, plain, options={**one, **shifted}),
        run(files, {}, RESOLUTION, options=one, data__codes="online"),
    ]
    scales = {"mode": "s2"}
    alone.append(run(files, {}, scales, options=one))
    want = run_ranks(run_cases, (alone,), 1, timeout_s=200)
    assert_same(want[2], want[0], "online codes")
    lost = want[0]["totals"][0][3:].sum() / want[1]["totals"][0][3:].sum()
    assert lost < 1, "unpadding drops patches"
    for name in LAYOUT_NAMES:
        degrees = LAYOUTS[name]
        cases = [
            run(files, degrees, RESOLUTION),
            run(files, degrees, plain, options=shifted),
            run(files, degrees, scales, data__codes="online"),
        ]
        world = int(np.prod([degrees.get(k, 1) for k in ("tp", "pp", "cp", "dp")]))
        got = run_ranks(run_cases, (cases,), world, timeout_s=400)
        assert_same(got[0], want[0], f"{name}, newline and unpad")
        assert_same(got[1], want[1], f"{name}, plain")
        assert_same(got[2], want[3], f"{name}, several scales, online")
    newline = want[0]["grads"]["projector.image_newline"]
    assert torch.count_nonzero(newline) == newline.numel()
    assert "projector.image_newline" not in want[1]["grads"]
