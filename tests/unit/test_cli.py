"""The command line's own parts: arguments, the number of ranks, questions, what a run came to."""

import io
import re

import pytest

from megatron_asvr.cli.chat import read_questions
from megatron_asvr.cli.common import world_size, write_report
from megatron_asvr.cli.main import main, parse
from megatron_asvr.cli.train import summary_lines
from megatron_asvr.config import schema
from megatron_asvr.config.load import load
from megatron_asvr.data.templates import TEMPLATES
from megatron_asvr.parallel.plan import layout_lines

RESULT = {
    "run": "runs/a",
    "finished": False,
    "step": 4,
    "total_steps": 9,
    "train": {"step": 4, "loss": 1.5, "text_loss": 1.0, "visual_loss": 0.5},
    "eval": {},
    "samples": 16,
    "tokens": 1234,
    "train_s": 2.0,
    "skipped_checkpoints": {8: "run/checkpoints/step_8/common.pt is damaged"},
    "failed_saves": 2,
    "peak_mem_bytes": [2**30, 2**31],
    "data": [
        {
            "records": 13,
            "images": 12,
            "bad_records": 1,
            "num_bad_images": 1,
            "bad_images": {"a.png": "missing file"},
            "placeholders": 1,
            "damaged_code_parts": 0,
        }
    ],
}


@pytest.mark.parametrize("number", ["0", "-3", "many"])
@pytest.mark.parametrize(
    "command",
    [
        ["eval", "run", "--data", "a.json", "--limit"],
        ["eval", "run", "--data", "a.json", "--max-new-tokens"],
        ["eval", "run", "--data", "a.json", "--ranks"],
        ["convert", "verify", "run", "hf", "--data", "a.json", "--samples"],
        ["chat", "run", "--max-new-tokens"],
        ["tokenizer", "fit", "--vision", "v", "--data", "d", "--out", "o", "--max-images"],
    ],
    ids=lambda command: f"{command[0]} {command[-1]}",
)
def test_counts_must_be_positive(command, number, capsys):
    with pytest.raises(SystemExit):
        parse([*command, number])
    assert f"invalid number of at least 1 value: {number!r}" in capsys.readouterr().err


def test_the_number_of_ranks_is_the_launchers_or_the_users_or_one_replica(monkeypatch):
    config = load(None, ["parallel.tp=2"])
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    assert world_size(config, None) == 2
    assert world_size(config, 4) == 4
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert world_size(config, None) == 2  # a batch script, not a job step
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert world_size(config, None) == 8
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert world_size(config, None) == 6


def test_a_summary_tells_what_was_wrong_with_the_data_and_how_to_go_on():
    text = "\n".join(summary_lines(RESULT))
    assert "run: runs/a" in text
    assert "train at step 4: loss 1.5000, text_loss 1.0000, visual_loss 0.5000" in text
    assert "stopped by a signal at step 4 of 9; the same command continues it" in text
    assert "not continued from: run/checkpoints/step_8/common.pt is damaged" in text
    assert "saves that failed: 2" in text
    assert "1,234 tokens; peak memory of a rank 2.00 GiB" in text
    assert "rank 0: bad_records 1, num_bad_images 1, placeholders 1" in text
    clean = {"records": 13, "images": 12, "bad_records": 0, "num_bad_images": 0, "bad_images": {}}
    finished = summary_lines({**RESULT, "finished": True, "data": [clean]})
    assert not any("data of" in line or "stopped" in line for line in finished)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_questions_come_from_a_file_or_from_a_person(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\n\n Where? \n"))
    assert read_questions() == ["What?", "Where?"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stdin", Terminal("What?\nWhere?\n\nnever read\n"))
    assert read_questions() == ["What?", "Where?"]
    assert "an empty line asks them" in capsys.readouterr().err


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_asvr.cli.tokenizer.run_inspect", interrupted)
    assert main(["tokenizer", "inspect", "folder"]) == 130
    assert capsys.readouterr().err == "asvr tokenizer: interrupted\n"


def test_a_report_makes_its_folder(tmp_path):
    write_report(str(tmp_path / "new" / "report.json"), {"ok": True})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]


def test_the_schema_names_every_conversation_template():
    assert set(schema.TEMPLATES) == set(TEMPLATES)


def test_the_layout_names_what_every_stage_holds():
    settings = ["parallel={tp: 2, pp: 2, vpp: 2}", "train.global_batch=6"]
    config = load("vicuna7b_stage2", [*settings, "train.micro_batch=2"])
    layout, first, last, imbalance, bubble, empty = layout_lines(config, 4, (16384,) * 8)
    assert layout == "layout: TP2 x PP2 x CP1 x DP1 x VPP2 = 4 ranks"
    layers = [[int(x) for x in re.findall(r"(\d+)(?= \+| layers)", line)] for line in (first, last)]
    assert sum(map(sum, layers)) == 32
    assert layers[1][1] < layers[1][0]  # beside the heads
    shares = [float(re.search(r"([\d.]+)% of the cost", line)[1]) for line in (first, last)]
    assert sum(shares) == pytest.approx(100, abs=0.11)
    measured = float(re.search(r"stages: ([\d.]+)", imbalance)[1])
    assert measured == pytest.approx(max(shares) / 50, abs=0.002)
    assert "3 a step, and 1 empty ones" in empty
    idle = float(re.search(r"idle for ([\d.]+)%", bubble)[1])
    longest = measured / 2
    assert idle == pytest.approx(100 - 150 / (3 * longest + (1 - longest) / 2), abs=0.1)
    assert "the last the LM head and the visual head" in imbalance
    alone = load("vicuna7b_stage2", ["parallel={pp: 4, tp: 1, head_alone: true}"])
    *_, last, imbalance, _ = layout_lines(alone, 4, (16384,) * 8)
    assert last.startswith("stage 3: 0 layers")
    assert "the last chunk the visual head alone" in imbalance
    assert layout_lines(load("vicuna7b_stage2"), 8, ()) == [
        "layout: TP8 x PP1 x CP1 x DP1 = 8 ranks"
    ]
