"""Every format gives the same records, and the same bytes of every image, in any order."""

import contextlib
import io
import json
import tarfile
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from megatron_asvr.batch import IGNORE
from megatron_asvr.config.schema import SourceConfig
from megatron_asvr.data import formats, locations
from megatron_asvr.data.loader import Loader
from megatron_asvr.data.records import read_records
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.errors import DataError
from tests.unit.data_corpus import TEXTS, ask, config
from tools.make_dirty_images import good_images

FILES = [(f"im{n}.{name[-3:]}", data) for n, (name, data) in enumerate(islice(good_images(), 7))]
TALKS = [ask(f"<image>\nWhat is {n}?", f"thing {n}") for n in range(len(FILES))]


def add(tar, name, data=b"", **header):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in header.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def write_tar(path, members, **header):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            add(tar, name, data, **header)
    return str(path)


def members():
    for number, (name, data) in enumerate(FILES):
        yield name, data
        yield f"im{number}.json", json.dumps({"conversations": TALKS[number]}).encode()


def make_json(folder):
    (folder / "pics").mkdir()
    for name, data in FILES:
        (folder / "pics" / name).write_bytes(data)
    raw = [
        {"id": f"im{n}", "image": f"pics/{FILES[n][0]}", "conversations": TALKS[n]}
        for n in range(len(FILES))
    ]
    (folder / "train.json").write_text(json.dumps(raw))
    (folder / "train.jsonl").write_text("\n".join([*map(json.dumps, raw), ""]))


def make_json_source(folder):
    make_json(folder)
    return SourceConfig(path=str(folder / "train.json"))


def make_jsonl(folder):
    make_json(folder)
    return SourceConfig(path=str(folder / "train.jsonl"))


def make_shards(folder):
    every = list(members())
    write_tar(folder / "s-00.tar", every[:6])
    write_tar(folder / "s-01.tar", every[6:])
    return SourceConfig(path=str(folder / "s-{00..01}.tar"))


def make_remote_shards(folder):
    source = make_shards(folder)
    store = fsspec.filesystem("memory")
    for name in ("s-00.tar", "s-01.tar"):
        store.pipe(f"/{folder.name}/{name}", (folder / name).read_bytes())
    return SourceConfig(path=f"memory://{folder.name}/s-*.tar", images=source.images)


def make_parquet(folder, **columns):
    table = columns or {
        "id": [f"im{n}" for n in range(len(FILES))],
        "image": [{"bytes": data, "path": name} for name, data in FILES],
        "conversations": TALKS,
    }
    pq.write_table(pa.table(table), folder / "part.parquet", row_group_size=3)
    return SourceConfig(path=str(folder / "*.parquet"), format="parquet")


MAKERS = [make_json_source, make_jsonl, make_shards, make_remote_shards, make_parquet]


@pytest.mark.parametrize("make", MAKERS)
def test_formats_agree(make, tmp_path):
    records = read_records([make(tmp_path)])
    assert [r.id for r in records] == [f"im{n}" for n in range(len(FILES))]
    assert [r.conversations[0][1].text for r in records] == [t[1]["value"] for t in TALKS]
    for number in (5, 0, 6, 3, 3):  # in any order
        (image,) = records[number].images
        assert locations.read(image) == FILES[number][1]
        size, _ = locations.state(locations.container(image))
        assert size >= len(FILES[number][1])


@pytest.mark.parametrize("make", MAKERS)
def test_the_loader_decodes_from_all_of_them(make, tmp_path):
    text = TextTokenizer.train(TEXTS, tmp_path / "tokenizer.model", vocab_size=420)
    reference = tmp_path / "reference"
    reference.mkdir()
    pixels = []
    for source in (make_json_source(reference), make(tmp_path)):
        settings = config(
            data__train=[{"path": source.path, "format": source.format}],
            data__cache_dir=str(tmp_path / "cache"),
        )
        with Loader(settings, text, split="train", device=torch.device("cpu")) as loader:
            loader.prepare()
            pixels.append([b.pixel_values_ICHW for b in loader.step(0)])
            assert loader.report()["num_bad_images"] == 0
    assert all(torch.equal(*pair) for pair in zip(*pixels, strict=True))


def test_images_alone_are_caption_free_records(tmp_path, caplog):
    (tmp_path / "pics" / "deep").mkdir(parents=True)
    (tmp_path / "pics" / "b.png").write_bytes(FILES[0][1])
    (tmp_path / "pics" / "deep" / "a.jpg").write_bytes(FILES[1][1])
    (tmp_path / "pics" / "notes.md").write_bytes(b"no image")
    (tmp_path / "pics" / "deep" / "c.heic").write_bytes(FILES[1][1])
    shard = write_tar(tmp_path / "only.tar", FILES)
    bare = make_parquet(tmp_path, image=[data for _, data in FILES])
    folder, tar, table = (
        read_records([s])
        for s in (SourceConfig(path=str(tmp_path / "pics")), SourceConfig(path=shard), bare)
    )
    assert [r.id for r in folder] == ["b.png", "deep/a.jpg"]
    assert "left out, because they are neither images nor text: 1 .heic, 1 .md" in caplog.text
    assert [locations.read(r.images[0]) for r in tar] == [data for _, data in FILES]
    assert [locations.read(r.images[0]) for r in table] == [data for _, data in FILES]
    for record in [*folder, *tar, *table]:
        ((turn,),) = record.conversations
        assert (turn.role, turn.text) == ("user", "<image>")


def test_captions_and_several_images(tmp_path, caplog):
    shard = write_tar(tmp_path / "s.tar", [
        ("x/k.txt", b"a lighthouse"), ("x/k.jpg", FILES[0][1]),
        ("k2.0.jpg", FILES[1][1]), ("k2.1.png", FILES[2][1]), ("k2.txt", b"two"), ("k2.cls", b"7"),
        ("k2.meta.json", b"{}"), (".k3.jpg", FILES[0][1]), ("README", b"hello"),
    ])  # fmt: skip
    one, two = read_records([SourceConfig(path=shard)])
    assert "neither images nor text: 1 .cls, 1 .jpg, 1 .meta.json, 1 .readme" in caplog.text
    assert [t.text for t in one.conversations[0]] == ["<image>", "a lighthouse"]
    assert [locations.read(i) for i in two.images] == [FILES[1][1], FILES[2][1]]
    table = make_parquet(
        tmp_path,
        images=[[FILES[0][1], FILES[1][1]], [FILES[2][1]], None],
        conversations=[ask("<image><image>Same?", "no"), ask("<image>?", "x"), ask("hi", "hello")],
    )
    both, _, none = read_records([table])
    assert [locations.read(i) for i in both.images] == [FILES[0][1], FILES[1][1]]
    assert none.images == ()


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("../../etc/x.jpg", {}),
        ("/etc/x.jpg", {}),
        ("a/../x.jpg", {}),
        ("x.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("x.jpg", {"type": tarfile.LNKTYPE, "linkname": "y.jpg"}),
        ("x.jpg", {"type": tarfile.CHRTYPE}),
        ("x.jpg", {"type": tarfile.FIFOTYPE}),
        ("x.jpg", {"type": tarfile.BLKTYPE}),
        ("x.jpg", {"type": tarfile.GNUTYPE_SPARSE}),
        ("x.jpg", {"pax_headers": {"path": "../../x.jpg"}}),
        ("x.jpg", {"pax_headers": {"linkpath": "/etc/passwd"}, "type": tarfile.SYMTYPE}),
    ],
)
def test_archives_that_lead_out_are_refused(tmp_path, name, header):
    shard = write_tar(tmp_path / "s.tar", [("good.jpg", FILES[0][1])])
    with tarfile.open(shard, "a") as tar:
        add(tar, name, **header)
    with pytest.raises(DataError, match=r"s\.tar: member .*x\.jpg.*(leads out|is a link)"):
        read_records([SourceConfig(path=shard)])


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        (tarfile.REGTYPE, 10**12, "truncated in member"),
        (tarfile.REGTYPE, -(10**6), "claims -1000000 bytes"),
        (tarfile.XHDTYPE, 10**12, r"a header at byte \d+ claims 1000000000000 bytes"),
        (tarfile.XHDTYPE, -(10**6), r"a header at byte \d+ claims -"),
        (tarfile.GNUTYPE_LONGNAME, 10**12, r"a header at byte \d+ claims"),
    ],
)
def test_sizes_that_lie_are_refused(tmp_path, kind, size, message):
    shard = write_tar(tmp_path / "s.tar", [("good.jpg", FILES[0][1])])
    with tarfile.open(shard, "a", format=tarfile.GNU_FORMAT) as tar:
        place = tar.offset
        tar.addfile(tarfile.TarInfo("x.jpg"))
    header = tarfile.TarInfo("x.jpg")
    header.size, header.type = size, kind
    data = bytearray(Path(shard).read_bytes())
    data[place : place + 512] = header.tobuf(tarfile.GNU_FORMAT)
    Path(shard).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_records([SourceConfig(path=shard)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": "a", "image": "a.jpg", "id": "b"}]', "has the key 'id' twice"),
        ('[{"id": NaN}]', "NaN is no number"),
        ('[{"id": -Infinity}]', "-Infinity is no number"),
        ('[{"id": 1e999}]', "the number 1e999 is too large"),
        ('[{"id": ' + "9" * 5000 + "}]", "is not JSON: Exceeds the limit"),
        ('[{"id": {"a": [[[' * 50_000, "nested too deeply"),
    ],
)
def test_json_that_is_none_or_says_two_things_is_refused(tmp_path, text, message):
    for name, content in (("x.json", text), ("x.jsonl", text[1:-1])):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"x\.{name[2:]}.*{message}"):
            read_records([SourceConfig(path=str(tmp_path / name))])
    shard = write_tar(tmp_path / "s.tar", [("k.json", text[1:-1].encode())])
    with pytest.raises(DataError, match=message):
        read_records([SourceConfig(path=shard)])
    table = make_parquet(tmp_path, image=[b"x"], conversations=[text])
    with pytest.raises(DataError, match=message):
        read_records([table])


def test_parquet_bombs_are_refused(tmp_path, monkeypatch):
    few = make_parquet(tmp_path, image=[b"x"])
    same = pa.table({"image": pa.nulls(400_000, pa.binary()), "id": ["same"] * 400_000})
    pq.write_table(same, tmp_path / "part.parquet")
    size = (tmp_path / "part.parquet").stat().st_size
    with pytest.raises(DataError, match=rf"part\.parquet claims 400000 rows in {size} bytes"):
        read_records([few])
    monkeypatch.setattr(formats, "MAX_TEXT_BYTES", 1000)
    long = make_parquet(tmp_path, image=[b"x"] * 2, caption=["short", "a" * 1001])
    with pytest.raises(DataError, match="rows 0 to 1: a 'caption' has more than 1000 bytes"):
        read_records([long])
    monkeypatch.setattr(formats, "MAX_GROUP_BYTES", 3000)
    wide = make_parquet(tmp_path, image=[b"x"], caption=["b" * 4000], other=["c"])
    with pytest.raises(DataError, match=r"row group 0 has \d+ bytes.*smaller row_group_size"):
        read_records([wide])


def test_json_bombs_are_refused(tmp_path, monkeypatch):
    deep = b"[" * 200_000
    (tmp_path / "deep.json").write_bytes(deep)
    with pytest.raises(DataError, match=r"deep\.json.*nested too deeply"):
        read_records([SourceConfig(path=str(tmp_path / "deep.json"))])
    shard = write_tar(tmp_path / "s.tar", [("k.json", deep)])
    with pytest.raises(DataError, match=r"sample 'k': its \.json is JSON .*nested too deeply"):
        read_records([SourceConfig(path=shard)])
    monkeypatch.setattr(formats, "MAX_TEXT_BYTES", 1000)
    with pytest.raises(DataError, match=r"'k\.json' has 200000 bytes; at most 1000"):
        read_records([SourceConfig(path=shard)])
    (tmp_path / "long.jsonl").write_text('{"id": 1}\n"' + "x" * 2000)
    with pytest.raises(DataError, match=r"long\.jsonl: line 2 has more than 1000 bytes"):
        read_records([SourceConfig(path=str(tmp_path / "long.jsonl"))])


def test_broken_files_are_named(tmp_path):
    shard = write_tar(tmp_path / "s.tar", FILES)
    whole = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[:2000])
    (tmp_path / "junk.tar").write_bytes(b"x" * 5000)
    (tmp_path / "junk.parquet").write_bytes(b"x" * 5000)
    (tmp_path / "x.jsonl").write_text('{"id": 1}\n{"id"')
    (tmp_path / "meta.tar").write_bytes(b"")
    meta = write_tar(tmp_path / "meta.tar", [("k.json", b'{"url": 1}'), ("k.jpg", b"")])
    make_parquet(tmp_path, label=[1, 2])
    (tmp_path / "empty").mkdir()
    for path, message in (
        (shard, "truncated in member|complete"),
        (str(tmp_path / "junk.tar"), r"junk\.tar is not a complete, uncompressed tar"),
        (str(tmp_path / "junk.parquet"), r"junk\.parquet is not a Parquet file"),
        (str(tmp_path / "x.jsonl"), r"x\.jsonl: line 2 is not JSON"),
        (str(tmp_path / "part.parquet"), r"part\.parquet has the columns label; wanted 'image'"),
        (str(tmp_path / "no-*.tar"), "no file matches"),
        (str(tmp_path / "absent.tar"), r"absent\.tar cannot be read: No such file"),
        (str(tmp_path / "x.tar.gz"), "compressed: decompress it"),
        (str(tmp_path / "empty"), "no folder with files"),
        (meta, r"meta\.tar: sample 'k': its \.json has no 'conversations' and there is no \.txt"),
        ("nosuch://bucket/x.tar", "nosuch"),
    ):
        with pytest.raises(DataError, match=message):
            read_records([SourceConfig(path=path)])


def test_locations_say_what_is_missing(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"0123456789")
    assert locations.read(locations.part(str(path), 3, 4)) == b"3456"
    with pytest.raises(OSError, match="3 bytes too early"):
        locations.read(locations.part(str(path), 8, 5))
    make_parquet(tmp_path, image=[b"x", None])
    table = str(tmp_path / "part.parquet")
    with pytest.raises(DataError, match="row 1: column 'image' holds no bytes"):
        locations.read(locations.cell(table, 1, "image"))
    with pytest.raises(OSError, match="2 rows"):
        locations.read(locations.cell(table, 2, "image"))


def test_patterns():
    assert locations.expand("a-{08..11}.tar") == [f"a-{n}.tar" for n in ("08", "09", "10", "11")]
    assert len(locations.expand("s3://b/{0..1}/{000..002}.tar")) == 6
    with pytest.raises(DataError, match="counts down"):
        locations.expand("{3..1}.tar")


def test_damaged_files_are_refused_or_read(tmp_path):
    """Whatever bytes change, nothing but a DataError comes out, or records with readable names."""
    whole = {
        "x.tar": Path(write_tar(tmp_path / "x.tar", [(n, d[:700]) for n, d in members()])),
        "x.parquet": tmp_path / "part.parquet",
    }
    make_parquet(tmp_path, id=["a", "b"] * 8, image=[b"bytes", None] * 8, caption=["hi", ""] * 8)
    rng = np.random.default_rng(0)
    refused = 0
    for name, path in whole.items():
        data = path.read_bytes()
        for _ in range(100):
            changed = bytearray(data)
            start = 512 * int(rng.integers(len(data) // 512))
            for place in rng.integers(start, min(start + 512, len(data)), 3):
                changed[place] = rng.integers(256)
            (tmp_path / name).write_bytes(changed)
            try:
                for record in read_records([SourceConfig(path=str(tmp_path / name))]):
                    for image in record.images:
                        with contextlib.suppress(OSError, DataError):
                            locations.read(image)
            except DataError:
                refused += 1
    assert 20 < refused < 200


def test_text_that_is_no_text_is_named(tmp_path):
    column = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    source = make_parquet(tmp_path, image=[b"x"], caption=column)
    with pytest.raises(DataError, match=r"part\.parquet is damaged.*utf-8"):
        read_records([source])


def test_images_alone_train_the_visual_loss_only(tmp_path):
    text = TextTokenizer.train(TEXTS, tmp_path / "tokenizer.model", vocab_size=420)
    shard = write_tar(tmp_path / "only.tar", FILES)
    talks = tmp_path / "talks"
    talks.mkdir()
    captioned = make_shards(talks)
    counts = []
    for sources in ([shard], [shard, captioned.path]):
        settings = config(
            data__train=[{"path": path} for path in sources],
            data__cache_dir=str(tmp_path / "cache"),
            train__global_batch=len(FILES) * len(sources),
        )
        with Loader(settings, text, split="train", device=torch.device("cpu")) as loader:
            loader.prepare()
            batches = loader.step(0)
        words = sum(int((b.text_targets_BS != IGNORE).sum()) for b in batches)
        counts.append((words, sum(b.num_visual_targets for b in batches)))
    answers = sum(len(text.encode(talk[1]["value"], at_start=False)) + 1 for talk in TALKS)
    assert counts == [(0, 4 * len(FILES)), (answers, 8 * len(FILES))]
