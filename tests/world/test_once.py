"""What is computed once instead of twice changes no loss, in no layout."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import numpy as np
import pytest
from torch import nn

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.cli.common import plan_lines
from megatron_asvr.config.check import check
from megatron_asvr.config.schema import Config
from megatron_asvr.data.parts import Part, RowForm, write_part
from megatron_asvr.errors import ConfigError, LaunchError
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.model.sharding import seeded_init
from megatron_asvr.parallel.groups import destroy
from megatron_asvr.train.caches import encode_all
from megatron_asvr.train.loop import train
from tests.run_cases import config as config_of_cases
from tests.run_cases import tokenizer
from tests.run_data import make_files, run_config

pytestmark = pytest.mark.world

FEATURES = {"data__features": "cache", "data__codes_verify_fraction": 1.0}
ONLINE = {"data__codes": "online"}
ONE_PASS = "one pass for features and codes: the tokenizer's encoder is the model's"
DRAWN = {"loss__visual_positions": 0.6}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel__tp": 2}),
    "pp2": (2, {"parallel__pp": 2}),
    "cp2": (2, {"parallel__cp": 2}),
    "dp2": (2, {}),
}


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="asvr-once-")  # removed when this process ends


@functools.cache
def files() -> Path:
    """A run's files, whose tokenizer has the encoder that the run draws from its seed."""
    folder = make_files(Path(scratch().name) / "files")
    run = config_of_cases()
    made = tokenizer(run.model.vision)
    named = nn.ModuleDict({"vision_encoder": made.encoder})
    seeded_init(named, run.run.seed, groups=None, std=run.model.vision.init_std)
    made.save(folder / "visual")
    return folder


def small(name: str, **changes: Any) -> Config:
    """Three steps that train all but the encoder."""
    common = {"train__steps": 3, "train__log_every_steps": 1, "train__save_every_steps": 3}
    return run_config(files(), files().parent / name, **{**common, **changes})


def train_all(configs: list[Config]) -> None:
    """Train some runs one after another."""
    for config in configs:
        assert train(config)["finished"]
        destroy()


def lines(config: Config, kind: str = "train") -> list[dict[str, Any]]:
    with RunFolder(config.run.dir).metrics.open() as stream:
        return [line for line in map(json.loads, stream) if line["kind"] == kind]


def losses(config: Config) -> list[float]:
    both = [*lines(config), *lines(config, "eval")]
    return [line[name] for line in both for name in ("loss", "visual_loss")]


def trained(name: str, world: int = 1, **changes: Any) -> tuple[Config, str]:
    """A run after its last step, and the log of rank 0."""
    config, log = small(name, **changes), files().parent / f"{name}_logs"
    run_ranks(train_all, ([config],), world, log_dir=log, timeout_s=200)
    return config, (log / "rank_0.log").read_text()


def norms(config: Config) -> list[float]:
    return [line["grad_norm"] for line in lines(config)]


@functools.cache
def plain() -> Config:
    """Codes from the cache, features in every step."""
    return trained("plain")[0]


@functools.cache
def some_positions() -> Config:
    """The visual loss from 2 or 3 of the 4 positions of every image."""
    return trained("drawn", **DRAWN)[0]


def test_some_positions_give_other_gradients_and_count_all_targets() -> None:
    drawn, full = lines(some_positions()), lines(plain())
    for some, every in zip(drawn, full, strict=True):
        assert some["visual_targets"] == every["visual_targets"]
        assert some["visual_loss"] != every["visual_loss"]
        assert some["visual_loss"] == pytest.approx(every["visual_loss"], rel=0.5)
    # Evaluation takes all positions; only the weights differ after three steps.
    some, every = lines(some_positions(), "eval"), lines(plain(), "eval")
    assert some[0]["visual_targets"] == every[0]["visual_targets"]
    assert drawn[0]["text_loss"] == full[0]["text_loss"]


def test_one_pass_gives_the_losses_of_two_to_the_bit() -> None:
    config, log = trained("online", **ONLINE)
    assert ONE_PASS in log
    assert losses(config) == losses(plain())


def test_a_dry_run_tells_of_the_one_pass() -> None:
    source = {"init__vision_encoder": plain().run.dir}
    assert ONE_PASS in plan_lines(small("dry", **ONLINE, **source), 1)
    lines = plan_lines(small("dry", **FEATURES, **source), 1)
    assert ONE_PASS in lines
    assert "features: 256 bytes a view as float32, 0.000 GiB for 12 images" in lines


def test_ranks_encode_both_in_one_pass_and_training_reads_them_to_the_bit() -> None:
    cached = {**FEATURES, "data__cache_dir": str(files().parent / "both")}
    done = run_ranks(encode_all, (small("cached", **cached, parallel__pp=2),), 2, timeout_s=200)
    assert (done["encoded"], done["cached"], done["features"]["cached"]) == (12, 12, 12)
    config, log = trained("cached", **cached)
    assert "are missing in" not in log
    assert losses(config) == losses(plain())
    assert all(line["features_moved"] == 0.0 for line in lines(config))


def test_changed_features_are_found_while_a_run_trains() -> None:
    cached = {**FEATURES, "data__cache_dir": str(files().parent / "moved")}
    done = run_ranks(encode_all, (small("moved", **cached),), 1, timeout_s=200)
    (path,) = Path(done["features"]["folder"]).glob("*.features")
    form = RowForm(num_patches=4, depth=16, dtype=np.dtype("<u4"), kind="feature")
    part = Part(path, form)
    rows = np.stack([part.row(number) for number in range(len(part.keys))])
    rows[:, 2, 5] ^= 1 << 31  # a sign of one patch in four
    path.unlink()
    write_part(path.parent, [key.tobytes().hex() for key in part.keys], rows, form)
    with pytest.raises(LaunchError, match=r"the features in .* 25.00% of \d+ features \(limit 2"):
        trained("moved", **cached)


def test_a_trained_encoder_has_no_features_to_cache() -> None:
    with pytest.raises(ConfigError, match=r"data\.features=cache holds what a frozen encoder"):
        check(small("wrong", **FEATURES, train__trainable=["vision_encoder", "projector"]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_take_the_same_steps(layout: str) -> None:
    world, degrees = LAYOUTS[layout]
    runs = {"online": ONLINE, "cached": FEATURES, "drawn": DRAWN}
    configs = {name: small(f"{layout}_{name}", **x, **degrees) for name, x in runs.items()}
    run_ranks(train_all, (list(configs.values()),), world, timeout_s=300)
    for name, config in configs.items():
        wanted = some_positions() if name == "drawn" else plain()
        assert losses(config) == pytest.approx(losses(wanted), rel=1e-6), name
        assert norms(config) == pytest.approx(norms(wanted), rel=1e-6), name
