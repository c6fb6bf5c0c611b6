"""What only a GPU can show: the same run and the same pixels as on the CPU.

Nobody has run these yet; docs/platforms.md says so until somebody does.
"""

import json
import os
import subprocess
import sys

from megatron_asvr.platforms import select

import pytest
import torch
import yaml

from megatron_asvr.config.load import to_dict
from tests.run_data import make_files, run_config

pytestmark = pytest.mark.gpu


def losses(files, run, platform, **settings):
    """Losses of a short run in processes of its own, on one platform."""
    path = run.with_suffix(".yaml")
    config = run_config(files, run, train__log_every_steps=1, **settings)
    path.write_text(yaml.safe_dump(to_dict(config)))
    command = [sys.executable, "-m", "megatron_asvr.cli.main", "train", str(path)]
    subprocess.run(command, env={**os.environ, "ASVR_PLATFORM": platform}, check=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if line["kind"] == "train"])


# In bf16 the GPU's attention is Transformer Engine's, where that is installed.
@pytest.mark.parametrize(
    ("precision", "packing", "bound"),
    [("fp32", False, 1e-3), ("bf16", False, 2e-2), ("bf16", True, 2e-2)],  # not measured yet
)
def test_a_run_on_the_gpu_has_the_losses_of_the_cpu(tmp_path, precision, packing, bound):
    files = make_files(tmp_path / "files")
    settings = {"train__precision": precision, "data__packing": packing}
    on_cpu, on_gpu = (losses(files, tmp_path / name, name, **settings) for name in ("cpu", "cuda"))
    assert len(on_cpu) == len(on_gpu) > 0
    torch.testing.assert_close(on_gpu, on_cpu, rtol=bound, atol=0)


def test_pixels_decoded_on_the_gpu_are_those_of_the_cpu(tmp_path):
    from megatron_asvr.data.dali.pipeline import ImageDecoder

    files = make_files(tmp_path / "files")
    encoded = [path.read_bytes() for path in sorted((files / "images").glob("*.png"))]
    cpu, gpu = (
        torch.cat(made.views(encoded)).cpu()
        for device in (torch.device("cpu"), select()[0].device)
        for made in [ImageDecoder(image_size=16, fit="pad", device=device, threads=1)]
    )
    assert (cpu.int() - gpu.int()).abs().max() <= 10  # DALI's CPU result differs so from PIL's
