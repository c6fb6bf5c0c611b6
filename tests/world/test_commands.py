"""The command line from a fitted tokenizer to a verified export, on a small real run."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from megatron_asvr.checkpoint.reader import read_run
from megatron_asvr.cli.main import main
from megatron_asvr.config.load import to_dict
from megatron_asvr.hf.verify import load_stock
from megatron_asvr.model.tokenizer import VisualTokenizer
from tests.run_data import make_files, run_config
from tests.unit.test_docs import DOCS, commands

ROOT = Path(__file__).resolve().parents[2]

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
    assert "parameters behind the selected layer are left out" in printed
    assert "no common pass for features and codes: codes come from the cache" in printed
    assert "data: 13 records, 4 steps an epoch, 4 steps in all" in printed
    assert "evaluation: 3 records" in printed
    (tmp_path / "eval.json").write_text('[{"conversations": 3}]')
    wrong = f"data.eval=[{{path: {tmp_path / 'eval.json'}}}]"
    assert main(["train", str(folder / "run.yaml"), "--dry-run", f"run.dir={fresh}", wrong]) == 1
    assert "record 0: 'conversations' is of type int" in capsys.readouterr().err
    assert not fresh.exists()


# What a document's command is given in addition, so that it suits a few small images.
REDUCED = {"tokenizer fit": ["--depth", "2", "--codebook-size", "8"]}


def test_every_command_of_the_documents_works(trained, tmp_path, monkeypatch, capsys):
    """As written, in a folder with the files that they name."""
    _, files, run = trained
    assert main(["convert", "export", str(run), "--out", str(tmp_path / "hf")]) == 0
    load_stock(tmp_path / "hf")[0].model.vision_tower.save_pretrained(tmp_path / "siglip")
    for image in (files / "images").iterdir():
        shutil.copy(image, tmp_path)
    shutil.copy(files / "images" / "0.png", tmp_path / "photo.jpg")
    shutil.copy(files / "text.model", tmp_path / "tokenizer.model")
    for name in ("train.json", "llava_558k.json"):
        shutil.copy(files / "train.json", tmp_path / name)
    shutil.copy(files / "eval.json", tmp_path / "test.json")
    monkeypatch.chdir(tmp_path)
    common = {
        "model__text_tokenizer": "tokenizer.model",
        "model__visual_tokenizer": "tokenizer",
        "data__train": [{"path": "train.json"}],
        "data__eval": [],
        "train__steps": 2,
    }
    stages = {
        "stage1": {"train__trainable": ["projector", "visual_head"], "init__all": "siglip"},
        "stage2": {"init__all": "runs/stage1"},
    }
    for name, changes in stages.items():
        config = run_config(files, Path("runs", name), **common, **changes)
        Path(f"{name}.yaml").write_text(yaml.safe_dump(to_dict(config)))
    typed = [command for doc in DOCS for command in commands(doc.read_text(encoding="utf-8"))]
    ran = [words for words in map(shlex.split, typed) if words[0] == "asvr"]
    for _, *words in ran:
        extra = REDUCED.get(" ".join(words[:2]), [])
        assert main([*words, *extra]) == 0, (words, capsys.readouterr())
    assert len(ran) >= 8
    printed = capsys.readouterr().out
    assert "language_model: 6,738,415,616 parameters, frozen" in printed  # of the dry run
    assert "accuracy" in printed
    assert "A: " in printed


def test_every_layout_gives_the_same_answers(trained, tmp_path):
    _, files, run = trained
    answers = []
    for name, extra in (
        ("tp2", ["parallel.tp=2"]),
        ("tp1", ["parallel.tp=1"]),
        ("tp2_sp", ["parallel.tp=2", "parallel.sp=true"]),
        ("dp2", ["parallel.tp=1", "--ranks", "2"]),
        ("pp2", ["parallel.tp=1", "parallel.pp=2"]),
    ):
        out = tmp_path / f"{name}.json"
        assert main(["eval", str(run), *questions(files), "--out", str(out), *extra]) == 0
        result = json.loads(out.read_text())
        assert result["num_questions"] == 9
        assert result["num_correct"] == sum(a["correct"] for a in result["answers"])
        answers.append([(a["id"], a["answer"]) for a in result["answers"]])
    assert all(found == answers[0] for found in answers)


def test_a_language_model_alone_answers_as_the_run_does(trained, tmp_path, capsys):
    _, files, run = trained
    out = tmp_path / "text"
    assert main(["convert", "export", str(run), "--out", str(out), "--kind", "text"]) == 0
    verify = ["convert", "verify", str(run), str(out), "--verify", "full"]
    assert main([*verify, *questions(files)]) == 1
    assert "every question has an image" in capsys.readouterr().err
    words = files / "train.json"  # one record of it is of words alone
    assert main([*verify, "--data", str(words), "--images", str(files / "images")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["architecture"] == "LlamaForCausalLM"
    assert report["num_samples"] == report["num_ids_equal"] == report["num_answers_equal"] == 1
    assert report["logits_max_abs"] < 1e-4
    assert report["weights"]["ok"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_export_equals_the_run_and_a_changed_weight_is_noticed(trained, tmp_path, dtype, capsys):
    _, files, run = trained
    out = tmp_path / "hf"
    assert main(["convert", "export", str(run), "--out", str(out), "--dtype", dtype]) == 0
    weights = ["convert", "verify", str(run), str(out)]
    verify = [*weights, "--verify", "full", *questions(files), "--samples", "3"]
    assert main([*verify, "--out", str(tmp_path / "v.json")]) == 0
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["ok"]
    assert report["num_samples"] == report["num_ids_equal"] == report["num_answers_equal"] == 3
    assert report["weights"]["ok"]
    assert report["weights"]["share_compared"] == 1
    assert main([*weights, "--out", str(tmp_path / "w.json")]) == 0
    assert json.loads((tmp_path / "w.json").read_text())["num_tensors_equal"] > 90
    assert main(["convert", "export", str(run), "--out", str(out)]) == 1  # nothing is overwritten
    model, processor = load_stock(out)
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(1.01)
    model.to(torch.bfloat16 if dtype == "bf16" else torch.float32).save_pretrained(out)
    assert processor is not None
    capsys.readouterr()
    assert main(weights) == 1
    assert "1 mismatches, the first: language_model.decoder.final_lay" in capsys.readouterr().err
    assert main([*weights, "--verify", "full"]) == 1
    assert "give both" in capsys.readouterr().err


def test_questions_that_cannot_be_asked_are_refused_before_the_model_is_loaded(
    trained, tmp_path, capsys, monkeypatch
):
    _, files, run = trained
    no_images = ["--data", str(files / "eval.json"), "--images", str(tmp_path)]
    assert main(["eval", str(run), *no_images]) == 1
    assert "3 images of the questions are missing" in capsys.readouterr().err
    assert main(["chat", str(run), "--image", "gone.png", "--question", "What?"]) == 1
    assert "gone.png" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["chat", str(run)]) == 1
    assert "give --question TEXT" in capsys.readouterr().err


def test_an_export_wants_the_tokenizer_that_the_run_learned_with(trained, tmp_path, capsys):
    _, files, run = trained
    kept, folder = tmp_path / "kept", files / "visual"
    folder.rename(kept)
    try:
        other = VisualTokenizer.load(kept)
        other.set_codebooks([table + 1 for table in other.codebooks.tables()])
        other.save(folder)
        assert main(["convert", "export", str(run), "--out", str(tmp_path / "hf")]) == 1
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)
    assert "restore that tokenizer's folder" in capsys.readouterr().err


def test_chat_answers_every_question(trained, capsys):
    _, files, run = trained
    ask = ["chat", str(run), "--image", str(files / "images" / "0.png"), "--max-new-tokens", "3"]
    assert main([*ask, "--question", "Which color?", "--question", "Which side?"]) == 0
    assert main([*ask[:2], "--max-new-tokens", "3", "--question", "No image?"]) == 0
    assert capsys.readouterr().out.count("A: ") == 3


def test_chat_prints_questions_and_answers_and_nothing_else(trained):
    """In a process of its own: what the ranks print is seen too."""
    _, files, run = trained
    command = [sys.executable, "-m", "megatron_asvr.cli.main", "chat", str(run)]
    command += ["--image", str(files / "images" / "0.png"), "--max-new-tokens", "3"]
    done = subprocess.run(
        command, cwd=ROOT, input="Which color?\n", capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"Q: Which color\?\nA: .*\n", done.stdout)
    assert done.stderr == ""


def test_a_run_says_where_its_logs_are_and_what_it_came_to(trained, tmp_path, capsys):
    folder, files, _ = trained
    records = json.loads((files / "train.json").read_text())
    records[2]["image"] = "gone.png"
    (tmp_path / "train.json").write_text(json.dumps(records))
    source = f"data.train=[{{path: {tmp_path / 'train.json'}, images: {files / 'images'}}}]"
    run = tmp_path / "run"
    assert main(["train", str(folder / "run.yaml"), source, f"run.dir={run}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"logs of the ranks: {run / 'attempts' / '0'}"
    assert f"run: {run}" in lines
    assert any(line.startswith("train at step 4: loss ") for line in lines)
    assert "num_bad_images 1, placeholders 1" in lines[-1]
    log = (run / "attempts" / "0" / "rank_0.log").read_text()
    assert "data.train: 1 of 12 images cannot be used; their 1 of 13 records are replaced" in log
    assert f"{files / 'images' / 'gone.png'}: missing file" in log
    assert "Warning" not in log


@pytest.mark.slow
def test_ranks_of_torchrun_train_and_speak_once(trained, tmp_path):
    folder, files, run = trained
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch += ["-m", "megatron_asvr.cli.main"]
    start = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
    train = ["train", str(folder / "run.yaml"), "parallel.tp=2", f"run.dir={tmp_path / 'run'}"]
    printed = start([*launch, *train]).stdout
    assert printed.count(f"run: {tmp_path / 'run'}") == 1
    assert printed.count("step 4/4 loss") == 1
    weights = [read_run(path)[1]("projector.linear_1.weight") for path in (run, tmp_path / "run")]
    assert torch.equal(*weights)
    out = tmp_path / "hf"
    assert main(["convert", "export", str(run), "--out", str(out)]) == 0
    full = ["convert", "verify", str(run), str(out), "--verify", "full"]
    printed = start([*launch, *full, *questions(files)]).stdout
    assert json.loads(printed)["ok"]  # one report
    printed = start([*launch, "eval", str(run), *questions(files)]).stdout
    assert printed.count("accuracy") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_lets_training_save_its_step(trained, tmp_path, number):
    folder, _, _ = trained
    command = [sys.executable, "-m", "megatron_asvr.cli.main", "train", str(folder / "run.yaml")]
    command += [f"run.dir={tmp_path / 'run'}", "parallel.tp=2", "data.eval=[]"]
    log = tmp_path / "run" / "attempts" / "0" / "rank_0.log"
    with subprocess.Popen(
        [*command, "train.steps=100000", "train.save_every_steps=100000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 300
        while not log.exists() or "step 2/" not in log.read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, number)  # as a terminal does with Ctrl-C
        printed = process.communicate(timeout=300)[0]
    assert process.returncode == 3
    assert "Traceback" not in printed
    assert "stopped by a signal at step" in printed
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    assert f"{saved.name.removeprefix('step_')} of 100000 steps" in printed


def test_ctrl_c_elsewhere_is_one_line(trained, tmp_path):
    """Before there is a step to finish."""
    _, files, run = trained
    asked = json.loads((files / "eval.json").read_text())
    (tmp_path / "many.json").write_text(json.dumps(asked * 10_000))  # a minute and more
    command = [sys.executable, "-m", "megatron_asvr.cli.main", "eval", str(run)]
    command += ["--data", str(tmp_path / "many.json"), "--images", str(files / "images")]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        while "answers: " not in (line := process.stderr.readline()):
            assert line, process.communicate()  # it ended by itself
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "asvr eval: interrupted\n" in said
    assert "Traceback" not in said


def test_tokenizer_is_fitted_inspected_and_encodes(trained, tmp_path, capsys):
    folder, files, run = trained
    vision = tmp_path / "vision"
    export = tmp_path / "hf"
    assert main(["convert", "export", str(run), "--out", str(export)]) == 0
    load_stock(export)[0].model.vision_tower.save_pretrained(vision)
    fitted = tmp_path / "fitted"
    fit = ["tokenizer", "fit", "--vision", str(vision), "--out", str(fitted)]
    records = json.loads((files / "train.json").read_text())
    records[2]["image"] = "gone.png"
    (tmp_path / "train.json").write_text(json.dumps(records))
    fit += ["--data", str(tmp_path / "train.json"), "--images", str(files / "images")]
    assert main([*fit, "--depth", "2", "--codebook-size", "8,4"]) == 0
    assert main([*fit, "--depth", "2", "--codebook-size", "8,4"]) == 1  # exists already
    capsys.readouterr()
    assert main(["tokenizer", "inspect", str(fitted)]) == 0
    printed = capsys.readouterr().out
    assert "codebooks 8, 4" in printed
    assert "fitted on 11 images" in printed
    assert f"left out: {files / 'images' / 'gone.png'}: missing file" in printed
    (tmp_path / "words.json").write_text(json.dumps(records[-1:]))
    words = ["tokenizer", "fit", "--vision", str(vision), "--data", str(tmp_path / "words.json")]
    assert main([*words, "--out", str(tmp_path / "none")]) == 1
    assert "words.json: no record has an image" in capsys.readouterr().err
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
    assert main([*train, "data.on_bad_sample=fail"]) == 1
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
