"""The 14 benchmarks by lmms-eval, offline: a tiny exported model answers, real rules judge."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_asvr.cli.main import main
from megatron_asvr.data.templates import find_template
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.errors import DataError
from megatron_asvr.hf.export import export, finalize
from megatron_asvr.hf.suite.tasks import BENCHMARKS
from tests.unit import hf_models

pytestmark = [pytest.mark.world, pytest.mark.eval]

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
NAMES = {benchmark.folder: benchmark.name for benchmark in BENCHMARKS}
SHORT = ["--max-new-tokens", "3", "--batch", "2"]


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """No hub, and every request of another kind goes to a port where nobody listens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name in ("http_proxy", "https_proxy"):
            patch.setenv(name, "http://127.0.0.1:9")
        yield


@pytest.fixture(scope="module")
def fixtures(offline):
    from tests.suite_data import fixtures

    return {fixture.folder: fixture for fixture in fixtures()}


@pytest.fixture(scope="module")
def data(fixtures, tmp_path_factory):
    from tests.suite_data import write

    folder = tmp_path_factory.mktemp("data")
    for fixture in fixtures.values():
        write(fixture, folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random LLaVA, exported with processor and chat template."""
    folder = tmp_path_factory.mktemp("model")
    text = TextTokenizer.train(hf_models.CORPUS * 9, folder / "text.model", vocab_size=330)
    config = hf_models.config("llama")
    made = export(
        hf_models.state(config).items(),
        config,
        tokenizer=text.path,
        out=folder / "hf",
        template=find_template("vicuna_short", text),
    )
    return finalize(made, folder / "hf")


def suite(model, data, out, *more):
    return main(
        ["eval", str(model), "--suite", "asvr14", "--data", str(data), "--out", str(out), *more]
    )


@pytest.fixture(scope="module")
def asked(model, data, tmp_path_factory):
    """The folder of a whole run on one rank."""
    out = tmp_path_factory.mktemp("one")
    assert suite(model, data, out, *SHORT) == 0
    return out


def results(out):
    return json.loads((out / "results.json").read_text())


def recorded(out):
    files = sorted((out / "answers").glob("*.json"))
    return {file.stem: json.loads(file.read_text())["answers"] for file in files}


def test_a_model_is_asked_all_benchmarks(asked, fixtures, capsys):
    report = results(asked)
    assert set(report["tasks"]) == set(NAMES.values())
    assert report["num_scored"] == 14
    assert not report["partial"]
    assert report["lmms_eval"] == "0.7.3"
    answers = recorded(asked)
    assert {folder: len(found) for folder, found in answers.items()} == {
        "seedbench": 2,  # not the video
        "mme": 8,  # perception
        **{
            f.folder: len(f.rows) for f in fixtures.values() if f.folder not in ("seedbench", "mme")
        },
    }
    texts = {text for found in answers.values() for text in found.values()}
    assert len(texts) > 14  # the model really spoke: words differ with question and picture


def test_ranks_share_the_questions_and_change_nothing(asked, model, data, tmp_path):
    assert suite(model, data, tmp_path, *SHORT, "--ranks", "2") == 0
    assert recorded(tmp_path) == recorded(asked)
    assert results(tmp_path) == results(asked)


def opened(folder, data, **options):
    """A benchmark's task, without ranks or a model."""
    from megatron_asvr.hf.suite import lmms

    (benchmark,) = (b for b in BENCHMARKS if b.folder == folder)
    options = {"limit": None, "max_new_tokens": None, **options}
    return lmms.Task(benchmark, data, **options)


def judged(task, answers):
    """The score of answers that are given for all rows there are."""
    return task.score([answers[row] for row in task.rows])


@pytest.mark.parametrize("folder", NAMES)
def test_right_answers_score_100_and_wrong_ones_0(folder, fixtures, data):
    fixture, task = fixtures[folder], opened(folder, data)
    assert judged(task, fixture.right)[0] == 100
    assert judged(task, fixture.wrong)[0] == 0
    assert judged(task, fixture.right)[0] == 100  # nothing is left over from before
    assert task.source.num_rows == len(fixture.rows)


# The first half of the answers (rounded up) is right; worked out by hand from the rules.
HALVES = {
    "textvqa": 200 / 3,
    "mmbench": 50,
    "mme": 50,  # of "existence" all pairs are right, of "count" none
    "seedbench": 50,
    "gqa": 200 / 3,
    "mmvp": 50,
    "hallusion_bench": 50,
    "pope": 50,  # one true positive, one false positive, one false negative
}


@pytest.mark.parametrize("folder", HALVES)
def test_half_of_the_answers_score_what_the_rules_say(folder, fixtures, data):
    fixture, task = fixtures[folder], opened(folder, data)
    half = task.rows[(len(task.rows) - 1) // 2]
    answers = fixture.right[: half + 1] + fixture.wrong[half + 1 :]
    assert judged(task, answers)[0] == pytest.approx(HALVES[folder])


def test_ocrbench_scores_as_lmms_eval_does_on_all_1000_rows(fixtures, data, tmp_path):
    from types import SimpleNamespace

    from lmms_eval.tasks.ocrbench import utils

    task = opened("ocrbench", data)
    rule = task._task.aggregation()["ocrbench_accuracy"]
    kinds = fixtures["ocrbench"].rows
    values = [
        {"question_type": kinds[i % 3]["question_type"], "score": int(i % 7 < 3)}
        for i in range(1000)
    ]
    theirs = utils.ocrbench_aggregate_accuracy(values, SimpleNamespace(output_path=tmp_path))
    assert rule(values) == pytest.approx(theirs)


def test_prompts_are_the_tasks_own_and_every_image_is_shown(data):
    task = opened("mme", data)
    assert task.prompts[0] == (
        "Is there a circle in this image? Yes\nAnswer the question using a single word or phrase."
    )
    assert (task.max_new_tokens, task.source.version) == (16, "0.0")
    assert opened("textvqa", data).until == ("ASSISTANT:",)
    assert opened("textvqa", data, max_new_tokens=5).max_new_tokens == 5
    assert [len(opened("mmmu", data).pictures(row)) for row in range(3)] == [1, 2, 1]
    assert all(image.mode == "RGB" for image in opened("mmmu", data).pictures(1))
    first, second = (opened("gqa", data).pictures(row)[0] for row in (0, 1))
    assert first.size == (40, 40)  # joined by its id: the files have the other order
    assert second.size == (47, 45)


def test_a_limit_keeps_pairs_together(data):
    assert opened("mmvp", data, limit=1).rows == [0, 1]
    assert opened("mme", data, limit=3).rows == [4, 5, 6, 7]
    assert opened("seedbench", data, limit=2).rows == [0, 2]
    assert opened("pope", data, limit=1).rows == [0]


@pytest.mark.parametrize(
    ("folder", "change", "words"),
    [
        ("seedbench", lambda row: row.pop("choice_b"), "choice_b"),
        ("mme", lambda row: row.pop("answer"), "answer"),
        ("pope", lambda row: row.update(answer="maybe"), "AssertionError"),
        ("chartqa", lambda row: row.update(question="<image>?"), "row 0: the question holds"),
        ("seedbench", lambda row: row.update(data_type="video"), "no row has one of"),
    ],
)
def test_data_of_another_form_is_refused_before_anything_is_asked(
    folder, change, words, fixtures, tmp_path
):
    from tests.suite_data import write

    rows = [dict(row) for row in fixtures[folder].rows]
    for row in rows:
        change(row)
    write(replace(fixtures[folder], rows=rows), tmp_path)
    with pytest.raises(DataError, match=words):
        opened(folder, tmp_path)


@pytest.fixture
def few(data, tmp_path):
    """Two benchmarks of the fourteen."""
    for folder in ("pope", "mmvp"):
        shutil.copytree(data / folder, tmp_path / "few" / folder)
    return tmp_path / "few"


def test_a_dry_run_lists_what_is_missing(few, model, capsys):
    listed = ["eval", str(model), "--suite", "asvr14", "--data", str(few), "--dry-run"]
    assert main(listed) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\| POPE .*\| lmms-lab-encoder/POPE:test +\| 4 +\|", lines[-2])
    assert f"missing: {few / 'gqa'} does not exist" in lines[9]
    assert lines[-1] == "2 of 14 benchmarks have data"
    (few / "pope" / "README.md").unlink()
    shutil.rmtree(few / "pope" / "data")
    assert main(listed) == 1
    assert "wanted parquet files of split 'test'" in capsys.readouterr().err


def test_a_run_goes_on_from_recorded_answers_and_takes_no_others(
    few, model, asked, tmp_path, capsys
):
    """The rest is asked again as before; what was there is kept, and judged."""
    out, baseline = tmp_path / "out", asked / "results.json"
    shutil.copytree(asked / "answers", out / "answers")
    file = out / "answers" / "pope.json"
    record = json.loads(file.read_text())
    before = record["answers"]
    batch = sorted(before, key=lambda row: list(before).index(row))[:2]
    record["answers"] = {row: "no" for row in before if row not in batch}
    file.write_text(json.dumps(record))
    assert suite(model, few, out, *SHORT, "--baseline", str(baseline)) == 0
    after = json.loads(file.read_text())["answers"]
    assert after == {row: before[row] if row in batch else "no" for row in before}
    report = results(out)
    assert report["partial"]
    assert report["num_scored"] == 2
    printed = capsys.readouterr().out
    assert f"missing: GQA: {few / 'gqa'} does not exist" in printed
    assert "average of 2 (partial)" in printed
    table = (out / "results.md").read_text()
    assert table in printed
    mine, theirs = report["tasks"]["MMVP"]["score"], results(asked)["tasks"]["MMVP"]["score"]
    assert re.search(rf"MMVP .*\| {mine:.2f} +\| {theirs:.2f} +\| \+0.00", table)
    other = shutil.copytree(model, tmp_path / "other")
    (other / "generation_config.json").write_text("{}")
    assert suite(other, few, out, *SHORT) == 1
    assert "holds answers of another run: model_sha256 differ" in capsys.readouterr().err
    limited = ["--limit", "2", "--baseline", str(baseline)]
    assert suite(model, few, tmp_path / "new", *SHORT, *limited) == 1
    assert "is no baseline for this run" in capsys.readouterr().err
    assert not (tmp_path / "new" / "answers").exists()


def test_the_commands_of_the_document_work(data, model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "model")
    shutil.copytree(model, tmp_path / "baseline")
    shutil.copytree(data / "pope", tmp_path / "benchmarks" / "pope")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split() for line in "".join(blocks).splitlines()]
    assert len(lines) == 4
    for program, *arguments in lines:
        assert program == "asvr"
        more = [] if "--dry-run" in arguments else SHORT[:2]
        assert main([*arguments, *more]) == 0


def test_the_document_lists_the_data_that_the_tasks_want(data):
    from megatron_asvr.train.suite import plan

    text = DOCUMENT.read_text(encoding="utf-8")
    for folder, task in zip(NAMES, plan(data).values(), strict=True):
        repository, split = task["hub"].split(":")
        row = rf"\| {folder} \| (\S+) \| (.*) ?\| {split} \| {task['task']} \|"
        found = re.search(row, text)
        assert found, folder
        name = found[2].split(",")[0].strip()
        assert "/".join(filter(None, (found[1], name))) == repository
