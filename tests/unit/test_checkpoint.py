"""Saving, continuing and reading a run on one rank."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch
from safetensors.torch import load_file

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.frozen import open_frozen, write_frozen
from megatron_asvr.checkpoint.identity import check_identity, identity
from megatron_asvr.checkpoint.load import find_resume, load_frozen, load_trained
from megatron_asvr.checkpoint.meta import read_meta
from megatron_asvr.checkpoint.reader import SafeReader, read_run
from megatron_asvr.errors import CheckpointError, ConfigError
from megatron_asvr.model.sharding import canonical_names
from megatron_asvr.parallel.groups import Groups
from tests.language_cases import one_rank
from tests.run_cases import IDENTITY, Bench, config, folder, save

STAGE_ONE = ["projector", "visual_head"]


def trained_once(groups: Groups, **changes: Any) -> Bench:
    """A bench after its first step; before it the optimizer has no state to save."""
    bench = Bench(config(**changes), groups)
    bench.step(0)
    return bench


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__trainable": STAGE_ONE},
        {"train__precision": "bf16", "train__trainable": ["vision_encoder", "language_model"]},
        {"train__optim__distributed": False},
        {"train__optim__distributed": False, "train__precision": "bf16"},
        {"model__language__tied_embeddings": True},
    ],
    ids=["fp32", "stage_one", "bf16_encoder", "plain", "plain_bf16", "tied"],
)
def test_a_continued_run_ends_with_the_same_bits(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = config(**changes)
    run_folder = folder(tmp_path)
    with one_rank() as groups:
        bench = Bench(run, groups)
        for step in range(6):
            if step == 3:
                save(bench, run_folder, 3)
            bench.step(step)
        wanted = bench.weights()

        meta = find_resume(run_folder, IDENTITY)
        assert meta is not None
        other_seed = dataclasses.replace(run, run=dataclasses.replace(run.run, seed=77))
        again = Bench(other_seed, groups, resume=(run_folder, meta))
        for step in range(3, 6):
            again.step(step)
        got = again.weights()
        assert [n for n in wanted if not torch.equal(wanted[n], got[n])] == []


def test_read_run_gives_every_weight_without_a_model(tmp_path: Path) -> None:
    run = config(train__trainable=STAGE_ONE)
    run_folder = folder(tmp_path)
    with one_rank() as groups:
        bench = Bench(run, groups)
        bench.step(0)
        bench.step(1)
        save(bench, run_folder, 2)
        for path in (run_folder.root, run_folder.step(2)):
            read, get = read_run(path)
            assert read == run
            names = canonical_names(bench.model)
            for local, param in bench.model.named_parameters():
                full = get(names[local])
                assert full is not None, local
                want = param.detach()[tuple(slice(s) for s in full.shape)]  # without padding
                assert torch.equal(full, want), local
        assert get("language_model.embedding.word_embeddings.weight").shape == (90, 32)
        assert get("visual_head.heads.2.weight").shape == (5, 16)
        assert get("nothing") is None


def test_a_frozen_file_is_ordinary_safetensors_named_by_its_content(tmp_path: Path) -> None:
    state = {"p.a": torch.randn(3, 4), "p.b": torch.randn(5).bfloat16(), "p.c": torch.tensor(2.0)}
    name = write_frozen(tmp_path, "p", state, state.items())
    assert write_frozen(tmp_path, "p", state, state.items()) == name
    other = {**state, "p.c": torch.tensor(3.0)}
    assert write_frozen(tmp_path, "p", other, other.items()) != name
    loaded = load_file(tmp_path / name)
    assert {n: x.tolist() for n, x in loaded.items()} == {n: x.tolist() for n, x in state.items()}
    assert torch.equal(open_frozen(tmp_path / name)["p.b"](), state["p.b"])
    assert list(tmp_path.glob(".*")) == []


def test_old_checkpoints_go_only_after_the_new_one_is_complete(tmp_path: Path) -> None:
    run_folder = folder(tmp_path)
    with one_rank() as groups:
        bench = trained_once(groups)
        for step in (1, 2, 3):
            save(bench, run_folder, step, keep=2)
        assert run_folder.steps() == [2, 3]
        (run_folder.step(3) / "meta.json").unlink()
        assert run_folder.latest() == 2
        run_folder.partial(4, 0).mkdir()
        run_folder.remove_partial()
        names = sorted(p.name for p in run_folder.checkpoints.iterdir())
        assert names == ["step_2", "step_3"]


def test_an_older_attempt_may_not_write(tmp_path: Path) -> None:
    run_folder = folder(tmp_path)
    run_folder.next_attempt()
    with one_rank() as groups:
        bench = trained_once(groups)
        with pytest.raises(CheckpointError, match=r"attempt 1 of .* has started since"):
            save(bench, run_folder, 1, attempt=0)
        assert run_folder.steps() == []
        save(bench, run_folder, 1, attempt=1)
        assert run_folder.steps() == [1]


def test_damage_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
    run_folder = folder(tmp_path)
    with one_rank() as groups:
        save(trained_once(groups, train__trainable=STAGE_ONE), run_folder, 1)
    path = run_folder.step(1)
    good = {p.name: p.read_bytes() for p in path.iterdir()}

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            find_resume(run_folder, IDENTITY)
        for name, data in good.items():
            (path / name).write_bytes(data)
        assert find_resume(run_folder, IDENTITY) is not None

    (path / "metadata.json").write_bytes(good["metadata.json"][:-1] + b"x")
    refused("metadata.json is damaged")
    shard = next(name for name in good if name.endswith(".distcp"))
    (path / shard).unlink()
    refused(f"{shard} is missing")
    (path / "meta.json").write_bytes(good["meta.json"][:40])
    refused("meta.json cannot be read")
    (path / "meta.json").write_text(json.dumps({"format": 99}))
    refused("another format")
    frozen = next(run_folder.frozen.iterdir())
    kept = frozen.read_bytes()
    frozen.unlink()
    with pytest.raises(CheckpointError, match=f"{frozen.name} cannot be read"):
        find_resume(run_folder, IDENTITY)
    frozen.write_bytes(kept)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    run_folder = folder(tmp_path)
    with one_rank() as groups:
        bench = trained_once(groups)
        meta = save(bench, run_folder, 1)
        wider = Bench(config(model__language__ffn_hidden_size=64), groups)
        with pytest.raises(CheckpointError, match=r"mlp\.linear_fc1\.weight has shape \[96, 32\]"):
            load_trained(run_folder, meta, wider.chunks, wider.optimizer, groups=groups)
        stage = Bench(config(train__trainable=STAGE_ONE), groups)
        with pytest.raises(CheckpointError, match="None: not trained"):
            load_trained(run_folder, meta, stage.chunks, stage.optimizer, groups=groups)
        with pytest.raises(CheckpointError, match=r"lacks .* weights that this run does not"):
            load_frozen(run_folder, meta, stage.chunks, groups=groups)


def test_an_index_that_names_foreign_classes_is_not_unpickled(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "touched",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match="which no index needs"):
        SafeReader(tmp_path).read_metadata()
    assert not (tmp_path / "touched").exists()


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a complete checkpoint nor a run folder"):
        read_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"no meta\.json"):
        read_meta(tmp_path)
    assert find_resume(RunFolder(tmp_path), IDENTITY) is None


def test_identity_names_what_changed(tmp_path: Path) -> None:
    data, text = tmp_path / "a.json", tmp_path / "t.model"
    data.write_text("[]")
    text.write_text("words")

    def facts(**changes: Any) -> dict[str, Any]:
        changes = {
            "data__train": [{"path": str(data)}],
            "model__text_tokenizer": str(text),
            **changes,
        }
        return identity(config(**changes), tokenizer_fingerprint="f1", image_keys=["a"])

    old = facts()
    check_identity(old, json.loads(json.dumps(facts())), where="here")
    # Neither the numbers nor their rounding depend on these.
    check_identity(old, facts(train__save_every_steps=7, run__dir="x", parallel__tp=2), where="-")
    for change, message in (
        ({"run__seed": 4}, "run.seed: checkpoint has 3, this run has 4"),
        (
            {"train__threads_per_rank": 2},
            "train.threads_per_rank: checkpoint has 1, this run has 2",
        ),
        ({"train__global_batch": 8}, "train.global_batch"),
        ({"model__vision__num_layers": 4}, "model.vision.num_layers"),
        ({"train__trainable": ["projector"]}, "train.trainable"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_identity(old, facts(**change), where="here")
    data.write_text("[1]")
    with pytest.raises(CheckpointError, match=r"data\.train\[0\]\.path \(content\)"):
        check_identity(old, facts(), where="here")
    data.unlink()
    with pytest.raises(ConfigError, match=r"data\.train\[0\]\.path=.* cannot be read"):
        facts()


def test_attempts_are_counted_and_the_newest_is_known(tmp_path: Path) -> None:
    run_folder = RunFolder(tmp_path / "run")
    assert [run_folder.next_attempt().name for _ in range(3)] == ["0", "1", "2"]
    assert run_folder.last_attempt() == 2
    assert run_folder.claim_attempt() == 2  # made by a launcher for the start that claims it
    assert run_folder.claim_attempt() == 3
    assert RunFolder(tmp_path / "other").claim_attempt() == 0
