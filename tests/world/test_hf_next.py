"""A trained any-resolution model is LLaVA-NeXT in transformers, and comes back from there."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from megatron_asvr.checkpoint.reader import read_run
from megatron_asvr.cli.main import main
from megatron_asvr.config.compare import differences
from megatron_asvr.config.load import to_dict
from megatron_asvr.hf.importer import read_folder
from megatron_asvr.hf.verify import load_stock
from tests.run_data import make_files, run_config

pytestmark = pytest.mark.world

SIZES = ((16, 16), (12, 60), (70, 20), (40, 44), (9, 300), (31, 24), (16, 33))
RESOLUTION = {
    "mode": "anyres",
    "grids": [[1, 2], [2, 1], [2, 2], [1, 3]],
    "newline": True,
    "unpad": True,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """Files with pictures of many shapes, and a run trained on two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("next")
    files = make_files(folder / "files")
    generator = np.random.default_rng(5)
    for number in range(12):
        pixels = generator.integers(0, 255, (*SIZES[number % len(SIZES)], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(files / "images" / f"{number}.png")
    records = json.loads((files / "train.json").read_text())[:7]
    two = {
        "id": "two",
        "image": ["1.png", "2.png"],
        "conversations": [
            {"from": "human", "value": "<image><image>\nIs it red?"},
            {"from": "gpt", "value": "yes"},
        ],
    }
    (files / "eval.json").write_text(json.dumps([*records, two]))
    config = run_config(
        files,
        folder / "run",
        model__resolution=RESOLUTION,
        data__max_length=160,
        data__pil_kinds=[
            "png"
        ],  # the very pixels: answers of a model that knows little are brittle
        train__steps=2,
    )
    (folder / "run.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert main(["train", str(folder / "run.yaml"), "parallel.tp=2"]) == 0
    return files, folder / "run"


def test_the_export_answers_as_the_run_and_comes_back_with_its_head(trained, tmp_path, capsys):
    files, run = trained
    out, report = tmp_path / "hf", tmp_path / "report.json"
    assert main(["convert", "export", str(run), "--out", str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlavaNextForConditionalGeneration"]
    assert config["image_grid_pinpoints"] == [[16, 32], [32, 16], [32, 32], [16, 48]]
    asked = ["--data", str(files / "eval.json"), "--images", str(files / "images")]
    asked += ["--samples", "12", "--out", str(report)]
    verify = ["convert", "verify", str(run), str(out), "--verify", "full", *asked]
    assert main(verify) == 0, capsys.readouterr()
    found = json.loads(report.read_text())
    assert found["ok"]
    assert found["architecture"] == "LlavaNextForConditionalGeneration"
    assert found["num_samples"] == found["num_answers_equal"] == found["num_ids_equal"] == 12
    assert found["logits_max_abs_own_pixels"] < 1e-4
    model, _ = load_stock(out)
    assert model.model.image_newline.abs().min() > 0

    assert main(["convert", "import", str(out), "--out", str(tmp_path / "back")]) == 0
    assert main(["convert", "verify", str(out), str(tmp_path / "back")]) == 0
    back = read_folder(tmp_path / "back")
    was, weights = read_run(run)
    assert back.model.resolution == was.model.resolution
    assert differences(back.head, was.model.visual_head) == []
    held = {name for name in back.names if "codebooks" not in name}
    assert "projector.image_newline" in held
    assert held == set(weights.stored)
    assert all(torch.equal(back(name), weights(name)) for name in held)
