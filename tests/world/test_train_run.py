"""Whole runs on real files: codes, sources of weights, reports, and the errors of bad input."""

import contextlib
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import numpy as np
import pytest
import torch

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.reader import read_run
from megatron_asvr.config.load import load
from megatron_asvr.config.schema import PARTS, Config
from megatron_asvr.data.parts import Part, RowForm, write_part
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.errors import LaunchError
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.parallel.collectives import barrier, gather_objects
from megatron_asvr.train.assemble import make_groups, open_data
from megatron_asvr.train.caches import encode_all, fill_caches
from megatron_asvr.train.loop import train
from tests.run_cases import config as config_of_cases
from tests.run_cases import tokenizer
from tests.run_data import make_files, run_config

pytestmark = pytest.mark.world

STAGE_ONE = {"train__trainable": ["projector", "visual_head"], "data__eval": []}


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="asvr-run-")  # removed when this process ends


@functools.cache
def files() -> Path:
    return make_files(Path(scratch().name) / "files")


def losses(run: Path, kind: str = "train") -> list[float]:
    lines = [json.loads(line) for line in RunFolder(run).metrics.open()]
    return [line["loss"] for line in lines if line["kind"] == kind]


@functools.cache
def stage_one() -> Path:
    run = files().parent / "stage_one"
    config = run_config(files(), run, parallel__tp=2, **STAGE_ONE)
    assert run_ranks(train, (config,), 2, timeout_s=240)["finished"]
    return run


def test_codes_are_encoded_once_and_equal_the_online_ones() -> None:
    folder = files().parent
    settings = {"data__cache_dir": str(folder / "own_cache"), "parallel__tp": 2}
    config = run_config(files(), folder / "cached", **settings)
    first = run_ranks(encode_all, (config,), 2, timeout_s=240)
    assert (first["encoded"], first["cached"]) == (12, 12)
    assert run_ranks(encode_all, (config,), 2, timeout_s=240)["encoded"] == 0
    part = next(Path(first["folder"]).glob("*.codes"))
    damaged = bytearray(part.read_bytes())
    damaged[-1] ^= 1
    part.write_bytes(damaged)
    again = run_ranks(encode_all, (config,), 2, timeout_s=240)
    assert (again["encoded"], again["cached"], list(again["damaged_parts"])) == (6, 12, [part.name])
    run_ranks(train, (config,), 2, timeout_s=240)
    online = run_config(files(), folder / "online", data__codes="online", **settings)
    run_ranks(train, (online,), 2, timeout_s=240)
    assert losses(folder / "cached") == pytest.approx(losses(folder / "online"), rel=1e-6)
    assert losses(folder / "cached", "eval") == pytest.approx(
        losses(folder / "online", "eval"), rel=1e-6
    )
    with pytest.raises(LaunchError, match="needs no cache"):
        run_ranks(encode_all, (online,), 2, timeout_s=240)
    stages = run_config(files(), folder / "stages", data__codes="online", parallel__pp=2)
    run_ranks(train, (stages,), 2, timeout_s=240)
    for kind in ("train", "eval"):
        want = losses(folder / "cached", kind)
        assert losses(folder / "stages", kind) == pytest.approx(want, rel=1e-5)  # measured 3e-7


def test_codes_that_are_missing_can_be_an_error_that_says_what_differs(tmp_path: Path) -> None:
    codes = {"data__cache_dir": str(tmp_path / "codes")}
    run_ranks(encode_all, (run_config(files(), tmp_path / "a", **codes),), 1, timeout_s=240)
    settings = {**codes, "data__encode_missing": False, "data__image_fit": "pad"}
    with pytest.raises(LaunchError) as error:
        run_ranks(train, (run_config(files(), tmp_path / "b", **settings),), 1, timeout_s=240)
    message = str(error.value)
    assert "no codes of 12 of 12 images, and data.encode_missing=false" in message
    assert "was made with data.image_fit 'square' instead of 'pad'" in message


def checked_run(name: str, *, ranks: int = 1, **settings: Any) -> list[dict[str, Any]]:
    """The logged lines of a run that computes half of its codes again."""
    fixed = {"data__cache_dir": str(files().parent / "checked"), "data__eval": []}
    fixed |= {"train__steps": 4, "data__codes_verify_fraction": 0.5}
    config = run_config(files(), files().parent / name, **{**fixed, **settings})
    run_ranks(train, (config,), ranks, timeout_s=240)
    lines = map(json.loads, RunFolder(files().parent / name).metrics.open())
    return [line for line in lines if line["kind"] == "train"]


def test_a_share_of_the_codes_is_computed_again_and_changes_nothing() -> None:
    quiet = checked_run("quiet", data__codes_verify_fraction=0.0)
    checked = checked_run("checked_1")
    assert [line["loss"] for line in checked] == [line["loss"] for line in quiet]
    one, two = (read_run(files().parent / name)[1] for name in ("quiet", "checked_1"))
    for name in ("projector.linear_2.weight", "visual_head.heads.1.weight"):
        assert torch.equal(one(name), two(name))
    assert not any(name.startswith("code_flips") for line in quiet for name in line)
    numbers = [line["codes_checked_images"] for line in checked]
    assert 2 < sum(numbers) < 14  # of 16 samples, one in 13 without an image
    assert all(line[f"code_flips_{depth}"] == 0 for line in checked for depth in range(3))
    layout = {"parallel__tp": 2, "parallel__pp": 2}
    split = checked_run("checked_4", ranks=4, **layout)
    assert [line["codes_checked_images"] for line in split] == numbers


def test_tiles_are_checked_like_images() -> None:
    tiles = {"mode": "anyres", "grids": [[1, 2], [2, 1]]}
    settings = {"train__steps": 2, "data__codes_verify_fraction": 1.0}
    (line,) = checked_run("tiles", model__resolution=tiles, **settings)
    assert line["codes_checked_images"] in (21, 24)  # 3 views; one sample in 13 has no image
    assert all(line[f"code_flips_{depth}"] == 0 for depth in range(3))


def test_codes_that_this_machine_does_not_compute_stop_the_run() -> None:
    checked_run("made", train__steps=1, data__cache_dir=str(files().parent / "made_codes"))
    (folder,) = (files().parent / "made_codes").glob("*/manifest.json")
    (part,) = folder.parent.glob("*.codes")
    form = RowForm(num_patches=4, depth=3, dtype=np.dtype("<u2"))
    written = Part(part, form)
    keys = [key.tobytes().hex() for key in written.keys]
    codes = np.stack([written.row(row) for row in range(len(keys))])
    codes[:, 1, 2] = (codes[:, 1, 2] + 1) % 5  # one patch in four, at the last depth
    write_part(files().parent / "changed" / folder.parent.name, keys, codes, form)
    changed = {"data__cache_dir": str(files().parent / "changed")}
    with pytest.raises(LaunchError, match=r"images, depth 2: 25.00% of \d+ codes \(limit 2.00%\)"):
        checked_run("other_codes_refused", **changed)
    lines = checked_run("allowed", data__codes_max_flip=[0.0, 0.0, 0.3], **changed)
    assert next(line["code_flips_2"] for line in lines if "code_flips_2" in line) == 0.25
    with pytest.raises(LaunchError, match="codes_max_flip gives 2 limits for codes of 3 depths"):
        checked_run("wrong", data__codes_max_flip=[0.0, 0.0], **changed)


def fill_seen_by_one(config: Config) -> tuple[int, list[int]]:
    """Rank 1 still sees the codes of another job, which are gone; what was encoded, and held."""
    groups = make_groups(config)
    with contextlib.closing(open_data(config, groups=groups)) as data:
        if groups.rank == 1:
            keys = data.train.image_keys()
            shape = (len(keys), data.codes.num_patches, data.codes.depth)
            data.codes.write(keys, np.zeros(shape, dtype=np.int64))
            data.codes.refresh()
            for part in data.codes.folder.glob("*.codes"):
                part.unlink()
            assert len(data.codes) == len(keys)
        barrier(group=groups.world)
        encoded = fill_caches(data, groups=groups)
        written = len(list(data.codes.folder.glob("*.codes")))
        return encoded, gather_objects(written, group=groups.world)


def test_ranks_that_see_different_caches_encode_together(tmp_path: Path) -> None:
    config = run_config(files(), tmp_path / "run", data__cache_dir=str(tmp_path / "codes"))
    assert run_ranks(fill_seen_by_one, (config,), 2, timeout_s=120) == (12, [2, 2])


@pytest.mark.parametrize("stages", [1, 2])
def test_a_second_stage_starts_from_the_first_with_another_layout(stages: int) -> None:
    one, two = stage_one(), files().parent / f"stage_two_{stages}"
    tiny = {"train__optim__lr": 1e-30, "train__steps": 1}  # too small to move a weight
    tiny["model__language__head_dim"] = 8  # the default, written out
    tiny["parallel__pp"] = stages
    config = run_config(files(), two, init__all=str(one), data__eval=[], **tiny)
    log_dir = files().parent / f"logs_{stages}"
    assert run_ranks(train, (config,), stages, log_dir=log_dir, timeout_s=240)["step"] == 1
    log = (log_dir / "rank_0.log").read_text()
    assert all(f"weights of {part} from {one}" in log for part in PARTS)
    assert "parameters behind the selected layer are left out" in log
    assert "no common pass for features and codes: codes come from the cache" in log
    before, after = read_run(one)[1], read_run(two)[1]
    for name in ("projector.linear_2.weight", "visual_head.heads.1.weight"):
        assert torch.equal(before(name), after(name))
    word = "language_model.embedding.word_embeddings.weight"
    assert torch.equal(before(word), after(word))  # frozen there, trained here
    assert load(RunFolder(two).config) == config


def test_a_baseline_leaves_the_head_of_its_source_and_a_new_head_is_drawn() -> None:
    base, again = files().parent / "baseline", files().parent / "with_head"
    trained = ["projector", "language_model"]
    common = {"train__steps": 1, "data__eval": [], "init__all": str(stage_one())}
    config = run_config(files(), base, loss__visual_weight=0.0, train__trainable=trained, **common)
    run_ranks(train, (config,), 1, timeout_s=240)
    assert read_run(base)[1]("visual_head.norm.weight") is None
    config = run_config(files(), again, **{**common, "init__all": str(base)})
    run_ranks(train, (config,), 1, timeout_s=240)
    assert read_run(again)[1]("visual_head.norm.weight") is not None
    config = run_config(files(), again, **{**common, "init__visual_head": str(base)})
    shutil.rmtree(again)
    with pytest.raises(LaunchError, match=r"CheckpointError: .* weights are missing"):
        run_ranks(train, (config,), 1, timeout_s=240)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__language__rope_theta": 5e5}, r"ConfigError: .*language_model.*rope_theta is"),
        ({"model__vision__num_heads": 4}, r"ConfigError: .*vision_encoder.*num_heads is 2 there"),
        ({"init__all": "/nowhere"}, "ConfigError: init source '/nowhere' of vision_encoder is"),
        ({"model__visual_tokenizer": "/nowhere"}, "CheckpointError: /nowhere"),
        ({"model__vision__image_size": 24}, "ConfigError: model.visual_tokenizer has a grid"),
        ({"train__global_batch": 3}, r"ConfigError: train\.global_batch=3"),
        ({"run__dir": "/dev/null/run"}, "ConfigError: run.dir='/dev/null/run' cannot be written"),
        ({"data__cache_dir": "/dev/null/c"}, "ConfigError: data.cache_dir='/dev/null/c' cannot be"),
        ({"loss__mode": "official"}, r"ConfigError: loss.mode='official' knows one .*'q0' .*3;"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    changes: dict[str, Any], message: str
) -> None:
    run = files().parent / "refused"
    config = run_config(files(), run, **{"init__all": str(stage_one()), **changes})
    with pytest.raises(LaunchError, match=message):
        run_ranks(train, (config,), 1, timeout_s=240)
    assert not RunFolder(run).metrics.exists()


def test_weights_that_learned_other_codes_or_words_are_refused() -> None:
    run, other = files().parent / "other_codes", files().parent / "other_tokenizer"
    tokenizer(config_of_cases().model.vision, seed=2).save(other)
    settings = {"model__visual_tokenizer": str(other), "data__eval": []}
    config = run_config(files(), run, init__all=str(stage_one()), **settings)
    match = "visual_head in .* was trained with another model.visual_tokenizer"
    with pytest.raises(LaunchError, match=match):
        run_ranks(train, (config,), 1, timeout_s=240)
    words = files().parent / "other.model"
    texts = ["USER: Which side? ASSISTANT: yes red green blue grey left right color it Say"] * 40
    TextTokenizer.train(texts, words, vocab_size=300)
    config = run_config(files(), run, init__all=str(stage_one()), model__text_tokenizer=str(words))
    with pytest.raises(LaunchError, match=r"language_model in .* another model\.text_token"):
        run_ranks(train, (config,), 1, timeout_s=240)
    named = {f"init__{part}": str(stage_one()) for part in ("projector", "language_model")}
    config = run_config(files(), run, train__steps=1, **named, **settings)
    assert run_ranks(train, (config,), 1, timeout_s=240)["finished"]


@pytest.mark.parametrize(("name", "layer"), [("pixels", None), ("shallow", 1)])
def test_appearance_codes_train_from_the_cache_and_online(name: str, layer: int | None) -> None:
    folder = files().parent
    made = tokenizer(config_of_cases().model.vision, kind="appearance", feature_layer=layer)
    made.save(folder / name)
    found = []
    for codes in ("cache", "online"):
        run = folder / f"{name}_{codes}"
        settings = {"data__codes": codes, "model__visual_tokenizer": str(folder / name)}
        config = run_config(files(), run, parallel__tp=2, **settings)
        assert run_ranks(train, (config,), 2, timeout_s=240)["finished"]
        found.append([*losses(run), *losses(run, "eval")])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_official_mode_trains_on_one_conversation_a_record() -> None:
    folder = files().parent
    records = json.loads((files() / "train.json").read_text())
    for record in records[:-1]:  # the last one has no image: it gets one of zeros
        record["conversations"] = record["conversations"][0]
    (folder / "plain.json").write_text(json.dumps(records[-5:]))
    source = {"path": str(folder / "plain.json"), "images": str(files() / "images")}
    found = []
    for tp in (1, 2):
        run = folder / f"official_{tp}"
        settings = {"loss__mode": "official", "parallel__tp": tp, "data__train": [source]}
        config = run_config(files(), run, **settings)
        assert run_ranks(train, (config,), tp, timeout_s=240)["finished"]
        found.append([*losses(run), *losses(run, "eval")])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_bad_images_hold_places_without_loss_and_are_named() -> None:
    folder = files().parent / "bad_files"
    make_files(folder, images=6)
    (folder / "images" / "2.png").write_bytes(b"no image")
    (folder / "images" / "3.png").unlink()
    bad = {"data__eval": [], "data__max_bad_share": 0.5}
    config = run_config(folder, folder.parent / "bad_run", **bad)
    result = run_ranks(train, (config,), 1, timeout_s=240)
    (report,) = result["data"]
    assert report["num_bad_images"] == 2
    assert report["placeholders"] == 2
    run = RunFolder(config.run.dir)
    named = [json.loads(line) for line in run.bad_samples.read_text().splitlines()]
    assert [(bad["split"], bad["id"], bad["reason"][:12]) for bad in named] == [
        ("train", "q2", "not an image"),
        ("train", "q3", "missing file"),
    ]
    met = [json.loads(line)["bad_samples"] for line in run.metrics.open() if '"train"' in line]
    assert met[-1] == result["bad_samples"] > 0
    # The counts of targets, and so the losses, are those of what is left, whatever the layout.
    other = run_config(folder, folder.parent / "bad_run_2", data__packing=True, **bad)
    assert run_ranks(train, (other,), 2, timeout_s=240)["finished"]
    assert losses(folder.parent / "bad_run_2") == pytest.approx(losses(run.root), rel=1e-5)
    config = run_config(
        folder, folder.parent / "strict_run", data__eval=[], data__on_bad_sample="fail"
    )
    with pytest.raises(LaunchError, match=r"(?s)DataError: .*2\.png"):
        run_ranks(train, (config,), 1, timeout_s=240)
