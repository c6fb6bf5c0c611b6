"""`asvr data check` says what is in a corpus, and `asvr data show` what training sees of it."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_asvr.cli.main import main
from megatron_asvr.config.load import save
from megatron_asvr.data.images import ImageIndex
from megatron_asvr.data.page import loss_bearing
from megatron_asvr.data.records import read_records
from megatron_asvr.data.report import percentiles
from megatron_asvr.data.sample import SampleBuilder
from megatron_asvr.data.text import TextTokenizer
from tests.unit.data_corpus import config
from tests.unit.test_data_index import GOOD, corpus

HOSTILE = '<script>alert("1")</script>\'"><img src=x onerror=alert(1)>'


@pytest.fixture
def made(tmp_path):
    sources = corpus(tmp_path)
    records = json.loads((tmp_path / "train.json").read_text())
    talk = [
        {"from": "human", "value": f"<image>\nIs {HOSTILE} red?"},
        {"from": "gpt", "value": f"yes {HOSTILE}"},
    ]
    records.append({"id": HOSTILE, "image": GOOD[0][0], "conversations": talk})
    (tmp_path / "train.json").write_text(json.dumps(records))
    cfg = config(
        data__train=[{"path": source.path} for source in sources],
        data__cache_dir=str(tmp_path / "cache"),
        train__global_batch=24,
        model__text_tokenizer=str(tmp_path / "tokenizer.model"),
        loss__visual_weight=0.0,
        train__trainable=["projector", "language_model"],
        data__max_length=400,
        data__packing=True,
    )
    save(cfg, tmp_path / "run.yaml")
    return tmp_path, cfg


def test_the_report_counts_what_is_there(made, capsys):
    folder, cfg = made
    out = folder / "report.json"
    arguments = ["data", "check", str(folder / "run.yaml"), "--workers", "1", "--out", str(out)]
    assert main([*arguments, "data.max_length=96", "data.on_overlong=cut_text"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())["train"]
    records = read_records(cfg.data.train)
    samples, images, steps = found["samples"], found["images"], found["steps"]
    assert samples["number"] == len(records) == sum(samples["kinds"].values())
    assert samples["images"]["p100"] == 2
    assert samples["length"]["p100"] == 96
    assert samples["cut"] >= 2  # `long` and the hostile one
    assert samples["cut_tokens"] > 100
    paths = {path for record in records for path in record.images}
    checked = ImageIndex(cfg, folder=folder / "cache", device=torch.device("cpu"))
    checked.prepare(paths)
    bad = checked.problems(paths)
    assert images["number"] == len(paths)
    assert images["bad"] == len(bad) == sum(images["reasons"].values())
    assert {"missing file", "truncated"} <= set(images["reasons"])
    assert images["shown_by_several_samples"] >= 2
    widths = [checked.entries[path].width for path in paths - set(bad)]
    assert images["width"]["p100"] == max(widths)
    assert images["width"]["mean"] == pytest.approx(np.mean(widths))
    assert sum(images["kinds"].values()) == images["good"] == len(widths)
    assert images["positions"]["p0"] == images["positions"]["p100"] == 4
    assert steps["an_epoch"] == steps["looked_at"] == 1
    assert steps["of_the_run"] == 10
    assert steps["packed"]["rows"] < steps["unpacked"]["rows"] == 20
    assert steps["placeholders"] == images["bad"] == 4
    assert steps["packed"]["useful"] > steps["unpacked"]["useful"]
    assert steps["encoder_images"]["p100"] <= 26
    balance = steps["balance"]
    assert 1 <= balance["2"]["by_cost"] <= balance["2"]["by_count"] + 1e-9
    assert f"data.train: {len(records)} samples" in printed
    assert "max/mean" in printed


def test_percentiles_are_values_that_occur():
    found = percentiles([5, 1, 9])
    assert (found["p0"], found["p50"], found["p100"], found["mean"]) == (1, 5, 9, 5.0)
    assert percentiles([]) == {}


class Page(HTMLParser):
    """Tags, marked text and the images of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.marked, self.images, self.titles = [], [], [], []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self._inside |= tag == "mark"
        assert not [name for name in values if name.startswith("on")]
        if "title" in values:
            self.titles.append(values["title"])
        if tag == "img":
            kind, _, data = values["src"].partition("base64,")
            assert kind == "data:image/png;"
            self.images.append(Image.open(io.BytesIO(base64.b64decode(data))).size)

    def handle_endtag(self, tag):
        self._inside &= tag != "mark"

    def handle_data(self, data):
        if self._inside:
            self.marked.append(data)


def test_the_page_shows_a_step_and_runs_nothing(made, capsys):
    folder, _ = made
    out = folder / "pages" / "step.html"
    arguments = ["data", "show", str(folder / "run.yaml"), "--out", str(out), "--samples", "24"]
    assert main([*arguments, "--step", "1"]) == 0
    assert str(out) in capsys.readouterr().out
    text = out.read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert HOSTILE not in text
    assert any(HOSTILE in title for title in page.titles)
    marked = "".join(page.marked)
    assert f"yes {HOSTILE}" in marked.replace("\n", "")
    assert "red?" not in marked  # a question
    assert set(page.images) == {(16, 16)}
    assert page.tags.count("h3") == 20  # four are bad
    assert page.tags.count("h2") == 3  # bad images too
    assert text.count("class=document") == 20
    assert "truncated" in text
    assert "<td>without anything to learn<td>4" in text


def test_a_step_that_is_not_there_is_refused(made, capsys):
    folder, _ = made
    show = ["data", "show", str(folder / "run.yaml"), "--out", str(folder / "x.html")]
    assert main([*show, "--step", "-1"]) == 1
    assert main([*show, "--split", "eval"]) == 1
    assert "data.eval lists no sources" in capsys.readouterr().err


def test_a_page_is_not_called_a_picture(made, capsys):
    folder, _ = made
    out = folder / "page.png"
    assert main(["data", "show", str(folder / "run.yaml"), "--out", str(out)]) == 1
    assert "ends in .html" in capsys.readouterr().err
    assert not out.exists()


def test_words_that_bear_loss(made):
    folder, cfg = made
    text = TextTokenizer(folder / "tokenizer.model")
    by_id = {record.id: record for record in read_records(cfg.data.train)}
    (row,) = SampleBuilder(cfg, text, branches=True).build(by_id["many"]).rows
    bears = loss_bearing(row)
    for branch in (1, 2, 3):
        own = bears & (row.branch_S == branch)
        assert text.decode(row.tokens_S[own]).strip() == "a circle"
        assert row.tokens_S[own][-1] == text.eos_id
    assert not bears[row.branch_S == 0].any()
