"""The command line from a fitted tokenizer to a verified export, on a small real run."""

import json

import pytest
import torch
import yaml

from megatron_asvr.cli.main import main
from megatron_asvr.config.load import to_dict
from megatron_asvr.hf.verify import load_stock
from tests.run_data import make_files, run_config

pytestmark = pytest.mark.world


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Files, and a run trained on two tensor-parallel ranks through the command line."""
    folder = tmp_path_factory.mktemp("commands")
    files = make_files(folder / "files")
    run = folder / "run"
    config = run_config(files, run, train__steps=4)
    (folder / "run.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert main(["train", str(folder / "run.yaml"), "parallel.tp=2"]) == 0
    return folder, files, run


def questions(files):
    return ["--data", str(files / "eval.json"), "--images", str(files / "images")]


def test_dry_run_prints_the_plan_and_trains_nothing(trained, capsys, tmp_path):
    folder, _, _ = trained
    fresh = tmp_path / "fresh"
    assert main(["train", str(folder / "run.yaml"), "--dry-run", f"run.dir={fresh}"]) == 0
    printed = capsys.readouterr().out
    assert "layout: TP1" in printed
    assert "visual_head:" in printed
    assert "data: 13 records, 4 steps an epoch, 4 steps in all" in printed
    assert not fresh.exists()


def test_every_layout_gives_the_same_answers(trained, tmp_path):
    _, files, run = trained
    answers = []
    for name, extra in (
        ("tp2", ["parallel.tp=2"]),
        ("tp1", ["parallel.tp=1"]),
        ("dp2", ["parallel.tp=1", "--ranks", "2"]),
    ):
        out = tmp_path / f"{name}.json"
        assert main(["eval", str(run), *questions(files), "--out", str(out), *extra]) == 0
        result = json.loads(out.read_text())
        assert result["num_questions"] == 9
        assert result["num_correct"] == sum(a["correct"] for a in result["answers"])
        answers.append([(a["id"], a["answer"]) for a in result["answers"]])
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_export_equals_the_run_and_a_changed_weight_is_noticed(trained, tmp_path, dtype, capsys):
    _, files, run = trained
    out = tmp_path / "hf"
    assert main(["convert", "export", str(run), "--out", str(out), "--dtype", dtype]) == 0
    verify = ["convert", "verify", str(run), str(out), *questions(files), "--samples", "3"]
    assert main([*verify, "--out", str(tmp_path / "v.json")]) == 0
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["ok"]
    assert report["num_samples"] == report["num_ids_equal"] == report["num_answers_equal"] == 3
    assert main(["convert", "export", str(run), "--out", str(out)]) == 1  # nothing is overwritten
    model, processor = load_stock(out)
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(1.01)
    model.to(torch.bfloat16 if dtype == "bf16" else torch.float32).save_pretrained(out)
    assert processor is not None
    capsys.readouterr()
    assert main(verify) == 1
    assert "logits_max_abs" in capsys.readouterr().err


def test_chat_answers_every_question(trained, capsys):
    _, files, run = trained
    ask = ["chat", str(run), "--image", str(files / "images" / "0.png"), "--max-new-tokens", "3"]
    assert main([*ask, "--question", "Which color?", "--question", "Which side?"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("A: ") == 2


def test_tokenizer_is_fitted_inspected_and_encodes(trained, tmp_path, capsys):
    folder, files, run = trained
    vision = tmp_path / "vision"
    export = tmp_path / "hf"
    assert main(["convert", "export", str(run), "--out", str(export)]) == 0
    load_stock(export)[0].model.vision_tower.save_pretrained(vision)
    fitted = tmp_path / "fitted"
    fit = ["tokenizer", "fit", "--vision", str(vision), "--out", str(fitted)]
    fit += ["--data", str(files / "train.json"), "--images", str(files / "images")]
    assert main([*fit, "--depth", "2", "--codebook-size", "8,4"]) == 0
    assert main([*fit, "--depth", "2", "--codebook-size", "8,4"]) == 1  # exists already
    capsys.readouterr()
    assert main(["tokenizer", "inspect", str(fitted)]) == 0
    assert "codebooks 8, 4" in capsys.readouterr().out
    encode = ["tokenizer", "encode", str(folder / "run.yaml"), f"data.cache_dir={tmp_path}"]
    assert main([*encode, f"model.visual_tokenizer={fitted}"]) == 0
    assert '"encoded": 12' in capsys.readouterr().out
    assert main([*encode, f"model.visual_tokenizer={fitted}"]) == 0
    assert '"encoded": 0' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["eval", "nowhere", "--data", "x.json"], "nowhere"),
        (["train", "nowhere.yaml"], "neither a file nor a preset"),
        (["tokenizer", "inspect", "nowhere"], "asvr tokenizer fit"),
        (["tokenizer", "fit", "--vision", "v", "--data", "d", "--out", "o",
          "--depth", "2", "--codebook-size", "1,2,3"], "3 sizes"),
    ],
)  # fmt: skip
def test_mistakes_are_one_clear_line(command, words, capsys):
    assert main(command) == 1
    assert words in capsys.readouterr().err


def test_a_mistake_found_by_a_rank_is_shown_as_itself(trained, tmp_path, capfd):
    folder, files, _ = trained
    records = json.loads((files / "train.json").read_text())
    records[2]["image"] = "gone.png"
    (tmp_path / "train.json").write_text(json.dumps(records))
    source = f"data.train=[{{path: {tmp_path / 'train.json'}, images: {files / 'images'}}}]"
    train = ["train", str(folder / "run.yaml"), source, f"run.dir={tmp_path / 'run'}"]
    assert main([*train, "data.on_bad_sample=error"]) == 1
    printed = capfd.readouterr().err
    assert printed.startswith("asvr train: DataError: ")
    assert "gone.png" in printed
    assert "Traceback" not in printed
    assert "Traceback" in (tmp_path / "run" / "attempts" / "0" / "rank_0.log").read_text()


def test_an_unknown_flag_or_word_is_refused(capsys):
    for wrong in (["train", "a.yaml", "--stepz", "3"], ["train", "a.yaml", "steps"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "a.b=c" in capsys.readouterr().err
