"""Saving, continuing and reading a run on one rank."""

import dataclasses
import json
import pickle
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import load_file

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.frozen import frozen_damage, open_frozen, write_frozen
from megatron_asvr.checkpoint.identity import check_identity, identity
from megatron_asvr.checkpoint.index import read_index
from megatron_asvr.checkpoint.load import Resume, find_resume, load_frozen, load_trained
from megatron_asvr.checkpoint.meta import Meta, ResumeState, read_meta, write_meta
from megatron_asvr.checkpoint.reader import read_run
from megatron_asvr.checkpoint.save import prune
from megatron_asvr.config.load import to_dict
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

        meta = find_resume(run_folder, IDENTITY).meta
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
    run = folder(tmp_path)
    name = write_frozen(run, "p", state, state.items(), attempt=0)
    assert write_frozen(run, "p", state, state.items(), attempt=0) == name
    other = {**state, "p.c": torch.tensor(3.0)}
    assert write_frozen(run, "p", other, other.items(), attempt=0) != name
    loaded = load_file(run.frozen / name)
    assert {n: x.tolist() for n, x in loaded.items()} == {n: x.tolist() for n, x in state.items()}
    assert torch.equal(open_frozen(run.frozen / name)["p.b"].read(), state["p.b"])
    assert list(run.frozen.glob(".*")) == []


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


def test_which_checkpoints_a_policy_lets_go(tmp_path: Path) -> None:
    run_folder = folder(tmp_path)
    for step in (10, 20, 25, 30, 40, 45):
        run_folder.step(step).mkdir(parents=True)
        (run_folder.step(step) / "meta.json").touch()
    run_folder.step(50).mkdir()  # not complete
    assert run_folder.doomed(2, 0) == [10, 20, 25, 30]
    assert run_folder.doomed(1, 20) == [10, 25, 30]
    assert run_folder.doomed(1, 20, protect=[25]) == [10, 30]
    assert run_folder.doomed(6, 0) == []
    prune(run_folder, 1, 20)
    assert run_folder.candidates() == [20, 40, 45, 50]


def test_an_older_attempt_may_not_write(tmp_path: Path) -> None:
    run_folder = folder(tmp_path)
    run_folder.next_attempt()
    with one_rank() as groups:
        bench = trained_once(groups)
        save(bench, run_folder, 2, attempt=0)  # the other one may still be refused
        assert run_folder.claim_attempt() == 1
        with pytest.raises(CheckpointError, match=r"attempt 1 of .* has started since"):
            save(bench, run_folder, 1, attempt=0)
        assert run_folder.steps() == [2]
        save(bench, run_folder, 1, attempt=1)
        assert run_folder.steps() == [1, 2]


@pytest.fixture
def two_saves(tmp_path: Path) -> RunFolder:
    """Checkpoints of steps 1 and 2 of a run that trains some of its parts."""
    run_folder = folder(tmp_path)
    with one_rank() as groups:
        bench = trained_once(groups, train__trainable=STAGE_ONE)
        save(bench, run_folder, 1)
        save(bench, run_folder, 2)
    return run_folder


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path, byte: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "common.pt", "metadata.json"])
@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (shorten, "is damaged: it has .* bytes, but .* were written"),
        (flip, "is damaged: its checksum does not fit"),
        (Path.unlink, "is missing: No such file"),
    ],
)
def test_a_run_goes_on_from_the_newest_checkpoint_that_verifies(
    two_saves: RunFolder, name: str, harm: Any, reason: str
) -> None:
    harm(two_saves.step(2) / name)
    found = find_resume(two_saves, IDENTITY)
    assert found.meta == read_meta(two_saves.step(1))
    assert list(found.skipped) == [2]
    assert re.search(f"step_2/{re.escape(name)} {reason}", found.skipped[2])
    two_saves.set_aside(2, attempt=7)
    assert two_saves.steps() == [1]
    assert [path.name for path in two_saves.damaged()] == ["damaged_step_2_attempt_7"]
    flip(two_saves.step(1) / "common.pt")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of .* can be used: .*common.pt is da"
    ):
        find_resume(two_saves, IDENTITY)


def test_every_bit_of_the_manifest_counts(two_saves: RunFolder) -> None:
    path = two_saves.step(2) / "meta.json"
    good = path.read_bytes()
    places = random.Random(0).sample(range(len(good)), 300)
    for place in [*places, good.index(b'"step": 2') + 8]:
        flip(path, place)
        found = find_resume(two_saves, IDENTITY)
        assert list(found.skipped) == [2], (place, good[place : place + 1])
        path.write_bytes(good)
    for text in (good[:40], b"", b"[]", json.dumps({"format": 99}).encode()):
        path.write_bytes(text)
        assert list(find_resume(two_saves, IDENTITY).skipped) == [2]
    path.unlink()
    assert "not a complete checkpoint" in find_resume(two_saves, IDENTITY).skipped[2]
    path.write_bytes(good)
    assert find_resume(two_saves, IDENTITY).skipped == {}


def test_damage_is_found_by_whoever_reads_the_weights(two_saves: RunFolder) -> None:
    trained = "visual_head.heads.0.weight"
    frozen = "language_model.decoder.final_layernorm.weight"
    _, get = read_run(two_saves.root)
    assert get(trained) is not None
    assert get(frozen) is not None
    flip(two_saves.step(2) / "__0_0.distcp")
    file = next(two_saves.frozen.glob("language_model-*"))
    flip(file)
    _, get = read_run(two_saves.root)
    with pytest.raises(CheckpointError, match=r"step_2/__0_0.distcp is damaged"):
        get(trained)
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged"):
        get(frozen)
    assert frozen_damage(file) == "is damaged: its name does not fit its contents"
    assert frozen_damage(file.with_name("none")) == "cannot be read: No such file or directory"
    file.write_bytes(file.read_bytes()[:20])
    assert frozen_damage(file) == "is damaged: its header cannot be read"


def test_settings_of_another_version_are_named_with_their_file(two_saves: RunFolder) -> None:
    step = two_saves.step(2)
    meta = read_meta(step)
    data = {**meta.config["data"], "on_bad_sample": "ignore"}
    write_meta(step, dataclasses.replace(meta, config={**meta.config, "data": data}))
    with pytest.raises(CheckpointError, match=r"step_2/meta.json .* data.on_bad_sample='ignore'"):
        read_run(two_saves.root)


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
        read_index(tmp_path)
    assert not (tmp_path / "touched").exists()


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a complete checkpoint nor a run folder"):
        read_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"no meta\.json"):
        read_meta(tmp_path)
    assert find_resume(RunFolder(tmp_path), IDENTITY) == Resume(None, {})


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
    engine = facts(precision__backend="te", precision__fp8={"emulate": True, "weights": True})
    check_identity(old, engine, where="-")
    check_identity({**old, "precision.backend": "te"}, facts(), where="written when it was a fact")
    for change, message in (
        ({"run__seed": 4}, "run.seed: checkpoint has 3, this run has 4"),
        (
            {"train__threads_per_rank": 2},
            "train.threads_per_rank: checkpoint has 1, this run has 2",
        ),
        ({"train__global_batch": 8}, "train.global_batch"),
        ({"precision__fp8__recipe": "block"}, "precision.fp8.recipe"),
        ({"model__vision__num_layers": 4}, "model.vision.num_layers"),
        ({"train__trainable": ["projector"]}, "train.trainable"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_identity(old, facts(**change), where="here")
    older = {key: value for key, value in old.items() if key != "train.deterministic"}
    check_identity(older, facts(), where="here")
    with pytest.raises(CheckpointError, match="deterministic: checkpoint has False, this run has"):
        check_identity(older, facts(train__deterministic=True), where="here")
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


def test_what_an_older_start_writes_gets_no_name(tmp_path: Path) -> None:
    run = folder(tmp_path)
    with run.written(run.config, 0) as path:
        path.write_text("old")
    state = {"p.a": torch.zeros(2)}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        assert run.claim_attempt() == 1  # in the middle of the older start's writing
        yield from state.items()

    with pytest.raises(CheckpointError, match=r"attempt 1 of .* has started since"):
        write_frozen(run, "p", state, tensors(), attempt=0)
    run.remove_partial()
    assert list(run.frozen.iterdir()) == []
    run.unfinished(run.config, 0).write_text("old too")
    with pytest.raises(CheckpointError, match=r"attempt 1 of .* has started since"):
        run.give_name(run.unfinished(run.config, 0), run.config, 0)
    with run.written(run.config, 1) as path:
        path.write_text("new")
    run.remove_partial()
    assert run.config.read_text() == "new"
    assert list(run.root.glob(".*")) == []


def test_what_a_newer_start_removed_is_not_published(tmp_path: Path) -> None:
    """The newer one began between the older one's look and its rename."""
    run = folder(tmp_path)
    unfinished = run.unfinished(run.config, 0)
    unfinished.write_text("old")
    look = RunFolder.require_newest
    looks: list[int] = []

    def looked(self: RunFolder, attempt: int) -> None:
        look(self, attempt)
        if not looks:
            looks.append(self.claim_attempt())
            self.remove_partial()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "require_newest", looked)
        with pytest.raises(CheckpointError, match=r"attempt 1 of .* has started since"):
            run.give_name(unfinished, run.config, 0)
    assert looks == [1]
    assert not run.config.exists()


def test_weights_of_8_bits_are_read_from_their_masters_or_not_at_all(tmp_path: Path) -> None:
    """A checkpoint as torch writes one; no run on the CPU has such weights."""
    name, master = "projector.linear_1.weight", torch.randn(4, 6)
    eight = {name: master.to(torch.float8_e4m3fn)}
    full = {**eight, f"optimizer.state.param.{name}": master}
    for step, state in enumerate((eight, full)):
        path = RunFolder(tmp_path).step(step)
        path.mkdir(parents=True)
        torch.distributed.checkpoint.save(state, checkpoint_id=path, no_dist=True)
        write_meta(
            path,
            Meta(
                resume=ResumeState(step=step),
                config=to_dict(config()),
                identity=IDENTITY,
                layout={},
                trained={name: [4, 6]},
                frozen={},
            ),
        )
    _, get = read_run(RunFolder(tmp_path).step(1))
    assert torch.equal(get(name), master)
    with pytest.raises(CheckpointError, match=r"in torch\.float8_e4m3fn and no fp32 master"):
        read_run(RunFolder(tmp_path).step(0))
