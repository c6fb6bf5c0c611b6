"""The index says what building every sample would, and is made again only where data changed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_asvr.cli.main import main
from megatron_asvr.config.load import save
from megatron_asvr.config.schema import SourceConfig
from megatron_asvr.data import images as images_module
from megatron_asvr.data import index as index_module
from megatron_asvr.data import samples as samples_module
from megatron_asvr.data.index import Index, build, index_folder, open_index, text_rules
from megatron_asvr.data.loader import Loader
from megatron_asvr.data.records import read_records
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.errors import DataError
from tests.unit.data_corpus import MPIEXEC, TEXTS, ask, config, turn
from tests.unit.test_data_sources import write_tar
from tools.make_dirty_images import bad_images, good_images

CPU = torch.device("cpu")
GOOD = list(good_images())[:16]
BAD = dict(bad_images())
TALK = "What color is the circle in the picture? "


def corpus(folder):
    """A JSON file with everything that may happen, a shard and a folder of images."""
    records = []
    for number, (name, data) in enumerate(GOOD[:8]):
        (folder / name).write_bytes(data)
        talk = ask("<image>" + TALK * (1 + number % 3), "red")
        records.append({"id": f"r{number}", "image": name, "conversations": talk})
    for name in ("truncated.jpg", "payload.png"):
        (folder / name).write_bytes(BAD[name])
        records.append({"id": name, "image": name, "conversations": ask("<image>?", "red")})
    records += [
        {"id": "gone", "image": "gone.png", "conversations": ask("<image>?", "red")},
        {"id": "long", "image": GOOD[0][0], "conversations": ask("<image>" + TALK * 30, "red")},
        {"id": "text", "conversations": ask("Hi, is there a blue triangle?", "yes")},
        {"id": "two", "image": [GOOD[0][0], GOOD[1][0]],
         "conversations": ask("<image><image>Same?", "no")},
        {"id": "many", "image": GOOD[2][0],
         "conversations": [ask(f"What is {n}?", "a circle") for n in range(3)]},
        {"id": "bare", "image": GOOD[3][0], "conversations": [turn("human", "<image>")]},
    ]  # fmt: skip
    (folder / "train.json").write_text(json.dumps(records))
    shard = write_tar(folder / "s-0.tar", [(n, d) for n, d in GOOD[8:12]] + [("x.jpg", b"junk")])
    (folder / "pics").mkdir()
    for name, data in [*GOOD[12:14], ("notes.md", b"no image")]:
        (folder / "pics" / name).write_bytes(data)
    TextTokenizer.train(TEXTS, folder / "tokenizer.model", vocab_size=420)
    paths = (str(folder / "train.json"), shard, str(folder / "pics"))
    return tuple(SourceConfig(path=path) for path in paths)


def settings(folder, sources, **changes):
    listed = [{"path": s.path} for s in sources]
    return config(
        data__train=listed,
        data__cache_dir=str(folder / "cache"),
        data__max_length=96,
        data__on_overlong="drop",
        **changes,
    )


@pytest.fixture
def made(tmp_path):
    sources = corpus(tmp_path)
    return tmp_path, sources, TextTokenizer(tmp_path / "tokenizer.model")


def loader(cfg, text, **options):
    found = Loader(cfg, text, split="train", device=CPU, **options)
    found.prepare()
    return found


def flat(batches):
    return [
        (b.sample_ids, b.tokens_BS.tolist(), b.document_BS.tolist(),
         None if b.pixel_values_ICHW is None else b.pixel_values_ICHW.tolist())
        for b in batches
    ]  # fmt: skip


def test_manifest_counts_and_names_every_bad_sample(made):
    folder, sources, text = made
    cfg = settings(folder, sources)
    manifest = build(cfg, sources, text, device=CPU)
    first, shard, pics = manifest["sources"]
    assert first["samples"] == 16
    assert (first["text"], first["caption-free"], first["multi-image"]) == (1, 1, 1)
    assert first["one-image"] == 13
    assert first["bad_samples"] == 4
    assert (shard["caption-free"], shard["bad_samples"]) == (5, 1)
    assert (pics["caption-free"], pics["bad_samples"], pics["left_out"]) == (2, 0, {"md": 1})
    assert first["left_out"] == shard["left_out"] == {}
    lines = Path(manifest["bad_samples"]).read_text().splitlines()
    found = {line["id"]: line["reason"] for line in map(json.loads, lines)}
    assert set(found) == {"truncated.jpg", "payload.png", "gone", "long", "x"}
    assert found["gone"] == "missing file"
    assert found["long"] == index_module.OVERLONG
    assert "truncated" in found["truncated.jpg"]
    assert "cannot be decoded" in found["payload.png"]


def test_indexed_records_are_the_sources_records(made):
    folder, sources, text = made
    cfg = settings(folder, sources)
    build(cfg, sources, text, device=CPU)
    assert list(open_index(cfg, sources).records) == read_records(sources)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("branches", [False, True])
def test_loader_gives_the_same_steps_and_scans_nothing(made, packing, branches, monkeypatch):
    folder, sources, text = made
    cfg = settings(folder, sources, data__packing=packing)
    with loader(cfg, text, branches=branches) as plain:
        wanted = [flat(plain.step(step)) for step in range(8)]
        keys, report = plain.image_keys(), plain.report()
    build(cfg, sources, text, device=CPU)

    def never(*_, **__):
        raise AssertionError("read at the start")

    monkeypatch.setattr(images_module.ImageChecker, "check", never)
    monkeypatch.setattr("megatron_asvr.data.sources.read_sources", never)
    with loader(cfg, text, branches=branches) as indexed:
        assert [flat(indexed.step(step)) for step in range(8)] == wanted
        assert indexed.image_keys() == keys
        now = indexed.report()
        for name in ("records", "images", "bad_images", "bad_records"):
            assert now[name] == report[name]


def test_packing_builds_only_the_samples_of_its_rank(made, monkeypatch):
    from megatron_asvr.data.collate import View

    folder, sources, text = made
    cfg = settings(
        folder, sources, data__packing=True, data__prefetch_batches=0, train__global_batch=20
    )
    build(cfg, sources, text, device=CPU)
    built = []
    plain = Loader._built

    def noting(self, number):
        built.append(number)
        return plain(self, number)

    monkeypatch.setattr(Loader, "_built", noting)
    with loader(cfg, text, view=View(dp_rank=0, dp=4)) as one:
        batches = one.step(0)
    assert 0 < len(set(built)) == len({i for b in batches for i in b.sample_ids}) < 12


def test_every_template_has_its_own_lengths(made, caplog):
    folder, sources, text = made
    cfg, other = settings(folder, sources), settings(folder, sources, data__template="plain")
    build(cfg, sources, text, device=CPU)
    with loader(other, text) as found:
        assert found._lengths is None
        assert "run `asvr data index` again" in caplog.text
        wanted = flat(found.step(0))
    build(other, sources, text, device=CPU)
    for settled in (cfg, other):
        with loader(settled, text) as found:
            assert found._lengths is not None
            assert (flat(found.step(0)) == wanted) == (settled is other)
    (folder / "pics" / "new.jpg").write_bytes(GOOD[15][1])
    build(cfg, sources, text, device=CPU)  # the other is of files that are no more
    left = list(index_folder(cfg, sources).glob(f"*/{index_module.MANIFEST}"))
    assert len(left) == 1
    with loader(other, text) as found:
        assert found._lengths is None


def test_only_what_changed_is_done_again(made, monkeypatch):
    folder, sources, text = made
    cfg = settings(folder, sources)
    first = build(cfg, sources, text, device=CPU)
    scanned, checked = [], []
    plain_scan, plain_look = index_module.records_of, images_module.ImageChecker._look

    def scan(source, file, left_out):
        scanned.append(Path(file).name)
        return plain_scan(source, file, left_out)

    def look(self, path, state):
        checked.append(Path(path).name)
        return plain_look(self, path, state)

    monkeypatch.setattr(samples_module, "records_of", scan)
    monkeypatch.setattr(images_module.ImageChecker, "_look", look)
    assert build(cfg, sources, text, device=CPU) == first
    assert (scanned, checked) == ([], ["gone.png"])  # what is missing may have come
    (folder / "gone.png").write_bytes(GOOD[14][1])
    (folder / "pics" / "new.jpg").write_bytes(GOOD[15][1])
    checked.clear()
    with pytest.raises(DataError, match=r"1 data files changed .*pics.*run `asvr data index`"):
        open_index(cfg, sources)
    again = build(cfg, sources, text, device=CPU)
    assert (scanned, sorted(checked)) == (["pics"], ["gone.png", "new.jpg"])
    assert [s["bad_samples"] for s in again["sources"]] == [3, 1, 0]
    assert len(open_index(cfg, sources).records) == 24
    tables = {p.name for p in index_folder(cfg, sources).glob("*.arrow")}
    assert tables == {*again["parts"], again["images"]}


def test_wrong_records_are_refused_and_leave_no_index(made):
    folder, sources, text = made
    (folder / "train.json").write_text(json.dumps([{"id": "a", "conversations": 7}]))
    cfg = settings(folder, sources)
    with pytest.raises(DataError, match=r"train\.json.*record 0 \(id 'a'\).*'conversations'"):
        build(cfg, sources, text, device=CPU)
    assert open_index(cfg, sources) is None


def test_a_damaged_index_is_refused(made):
    folder, sources, text = made
    cfg = settings(folder, sources)
    manifest = build(cfg, sources, text, device=CPU)
    (index_folder(cfg, sources) / manifest["images"]).write_bytes(b"junk")
    with pytest.raises(DataError, match="absent or damaged; run `asvr data index` again"):
        open_index(cfg, sources)
    assert build(cfg, sources, text, device=CPU) == manifest
    assert isinstance(open_index(cfg, sources), Index)


def write_config(folder, sources):
    cfg = settings(
        folder,
        sources,
        loss__visual_weight=0.0,
        train__trainable=["projector"],
        model__text_tokenizer=str(folder / "tokenizer.model"),
        model__language__max_positions=96,
    )
    save(cfg, folder / "run.yaml")
    return cfg


@pytest.mark.slow
def test_command_with_two_processes(made, capsys):
    folder, sources, text = made
    cfg = write_config(folder, sources)
    assert main(["data", "show", str(folder / "run.yaml")]) == 1
    assert "has no index" in capsys.readouterr().err
    assert main(["data", "index", str(folder / "run.yaml"), "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    assert '"bad_samples": 4' in printed
    assert main(["data", "show", str(folder / "run.yaml")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        line for line in printed.splitlines() if line.startswith("data.")
    ]
    manifest = open_index(cfg, sources).manifest
    assert build(cfg, sources, text, device=CPU) == manifest


@pytest.mark.slow
@pytest.mark.skipif(MPIEXEC is None, reason="needs mpiexec: pip install mpi4py mpich")
def test_command_with_processes_of_mpi(made):
    folder, sources, text = made
    cfg = write_config(folder, sources)
    command = [MPIEXEC, "-n", "3", sys.executable, "-m", "megatron_asvr.cli.main"]
    command += ["data", "index", str(folder / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.count('"bad_samples": 4') == 1  # the others work, and say nothing
    manifest = open_index(cfg, sources).manifest
    assert build(cfg, sources, text, device=CPU) == manifest


@pytest.mark.slow
def test_a_killed_index_goes_on(made, monkeypatch):
    folder, sources, text = made
    rng = np.random.default_rng(0)
    many = [(f"{n:04d}.jpg", GOOD[0][1] + rng.bytes(8)) for n in range(3000)]
    sources = (SourceConfig(path=write_tar(folder / "many.tar", many)),)
    cfg = write_config(folder, sources)
    script = (
        "import megatron_asvr.data.images as i; i.PART_IMAGES = 64\n"
        "from megatron_asvr.cli.main import main\n"
        f"main(['data', 'index', {str(folder / 'run.yaml')!r}, '--workers', '1'])"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    parts = folder / "cache"
    while len(list(parts.glob("images-*/*.arrow"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert open_index(cfg, sources) is None
    looked = []
    plain = images_module.ImageChecker._look
    monkeypatch.setattr(
        images_module.ImageChecker,
        "_look",
        lambda self, path, state: (looked.append(path), plain(self, path, state))[1],
    )
    build(cfg, sources, text, device=CPU)
    assert 0 < len(looked) <= 3000 - 3 * 64
    assert len(open_index(cfg, sources).records) == 3000


def test_a_blend_trains_on_its_shares_with_and_without_an_index(made):
    folder, _, text = made
    shard = write_tar(folder / "s-1.tar", GOOD[8:12])
    listed = [
        {"path": str(folder / "train.json"), "name": "talks", "max_samples": 8},
        {"path": shard, "name": "images", "epochs": 2.0},
    ]
    cfg = settings(folder, (), train__global_batch=16, data__prefetch_batches=0)
    cfg = replace(cfg, data=replace(cfg.data, train=tuple(SourceConfig(**s) for s in listed)))
    seen = []
    for indexed in (False, True):
        if indexed:
            build(cfg, cfg.data.train, text, device=CPU)
        with loader(cfg, text) as found:
            assert found.blend() == [("talks", 8, 16), ("images", 8, 4)]
            assert found.steps == 1
            seen.append([i for step in range(3) for b in found.step(step) for i in b.sample_ids])
    assert seen[0] == seen[1]
    shown = Counter(seen[0])
    images = [shown[name.partition(".")[0]] for name, _ in GOOD[8:12]]
    assert images == [6] * 4  # twice an epoch, in three epochs


def test_lengths_follow_the_sizes_of_images(made):
    """Known from the index, equal to those of built samples, and made again for another image."""
    folder, sources, text = made
    grids = {"mode": "anyres", "grids": [[1, 2], [2, 1], [3, 3]], "unpad": True}
    cfg = settings(folder, sources, data__packing=True, model__resolution=grids)
    with loader(cfg, text) as plain:
        wanted = [flat(plain.step(step)) for step in range(4)]
        views = plain.image_keys()
    build(cfg, sources, text, device=CPU)

    def lengths():
        return list(open_index(cfg, sources, text).lengths(text_rules(cfg, text), branches=True))

    before = lengths()
    with loader(cfg, text) as indexed:
        assert [flat(indexed.step(step)) for step in range(4)] == wanted
        assert indexed.image_keys() == views
        assert len(views) > 2 * len(indexed._sources.good_image_keys())
    file = io.BytesIO()
    Image.new("RGB", (900, 20)).save(file, "PNG")
    (folder / GOOD[4][0]).write_bytes(file.getvalue())
    build(cfg, sources, text, device=CPU)
    assert [i for i, (a, b) in enumerate(zip(before, lengths(), strict=True)) if a != b] == [4]
