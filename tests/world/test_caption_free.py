"""Images without captions train the visual loss, alone and beside captioned ones."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.meta import read_meta
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.train.loop import train
from tests.run_data import make_files, run_config

pytestmark = pytest.mark.world

N, IMAGES = 4, 12  # patches of an image, images of make_files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("caption_free") / "files", images=IMAGES)


def run(
    files: Path, name: str, *, ranks: int = 1, **settings: Any
) -> tuple[list[dict[str, Any]], Any]:
    """What a run logged, and its totals at the end."""
    folder = files.parent / name
    own = {"train__log_every_steps": 1, "train__save_every_steps": 100, "data__eval": []}
    config = run_config(files, folder, **{**own, **settings})
    assert run_ranks(train, (config,), ranks, timeout_s=240)["finished"]
    lines = [json.loads(line) for line in RunFolder(folder).metrics.open()]
    done = read_meta(RunFolder(folder).step(config.train.steps)).resume
    return [line for line in lines if line["kind"] == "train"], done


def test_images_alone_train_the_visual_loss_and_nothing_is_nan(files: Path) -> None:
    alone = {"data__train": [{"path": f"{files}/images", "format": "images"}]}
    alone |= {"train__steps": 24, "train__global_batch": IMAGES, "train__micro_batch": 4}
    lines, done = run(files, "alone", **alone)
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    assert all(line["text_loss"] == line["text_accuracy"] == 0.0 for line in lines)
    for line in lines:  # the same sum, divided in another order
        assert line["loss"] == pytest.approx(line["visual_loss"], rel=1e-6)
    assert lines[-1]["visual_loss"] < 0.6 * lines[0]["visual_loss"]
    assert (done.text_targets, done.visual_targets) == (0, 24 * IMAGES * N)
    layout = {"parallel__tp": 2, "parallel__pp": 2}
    split, split_done = run(files, "alone_4", ranks=4, **alone, **layout)
    assert [line["loss"] for line in split] == pytest.approx(
        [line["loss"] for line in lines], rel=1e-5
    )
    assert (split_done.text_targets, split_done.visual_targets) == (0, 24 * IMAGES * N)


def test_mixed_with_captioned_ones_both_counts_are_right(files: Path) -> None:
    records = json.loads((files / "train.json").read_text())
    talks = [r["conversations"] for r in records if "image" in r]
    answers = [turns[1]["value"] for talk in talks for turns in talk]
    answers += [r["conversations"][1]["value"] for r in records if "image" not in r]
    text = TextTokenizer(str(files / "text.model"))
    # An answer follows a space, and ends with the end-of-text token.
    wanted = sum(len(text.encode(answer, at_start=True)) + 1 for answer in answers)
    captioned = {"path": str(files / "train.json"), "images": str(files / "images")}
    sources = [captioned, {"path": f"{files}/images", "format": "images"}]
    for name, taken, images in (("captioned", sources[:1], 1), ("mixed", sources, 2)):
        samples = images * IMAGES + 1  # one step is one epoch
        settings = {"train__global_batch": samples, "train__micro_batch": 1, "train__steps": 2}
        lines, done = run(files, name, data__train=taken, **settings)
        assert (done.text_targets, done.visual_targets) == (2 * wanted, 2 * images * IMAGES * N)
        assert all(math.isfinite(line["loss"]) and line["text_loss"] > 0 for line in lines)
