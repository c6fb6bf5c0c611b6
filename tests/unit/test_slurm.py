"""What is checked and written before anything is handed to Slurm; none is needed here."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from megatron_asvr.cli.main import main
from megatron_asvr.cli.submit import clear
from megatron_asvr.config.load import save as save_config
from megatron_asvr.launch.script import time_s
from tests.run_data import make_files, run_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("slurm") / "files")


@pytest.fixture
def config(files, tmp_path):
    """A run of batch 4 and micro-batch 2 on two tensor-parallel ranks."""
    path = tmp_path / "run.yaml"
    settings = {"parallel__tp": 2, "train__global_batch": 4, "train__micro_batch": 2}
    save_config(run_config(files, tmp_path / "a run", train__steps=8, **settings), path)
    return str(path)


def dry(capsys, *words: str) -> tuple[int, str, str]:
    """Status, script and what else was said."""
    status = main(["slurm", *words, "--dry-run"] if "--" not in words else ["slurm", *words])
    return status, *capsys.readouterr()


def test_a_dry_run_prints_plan_and_script_and_writes_nothing(config, capsys, tmp_path):
    status, script, said = dry(capsys, "submit", config, "--nodes", "2", "--time", "1:00:00")
    assert status == 0, said
    assert script.startswith('#!/usr/bin/env bash\n#SBATCH --job-name="a run"\n')
    assert "#SBATCH --nodes=2\n" in script
    assert '-m megatron_asvr train "$job/config.yaml"\n' in script
    assert "layout: TP2" in said
    assert "data.train has no index" in said
    assert not (tmp_path / "a run").exists()


def test_more_ranks_than_samples_are_refused_with_a_way_out(config, capsys):
    status, script, said = dry(capsys, "submit", config, "--nodes", "4", "--ranks-per-node", "2")
    assert (status, script) == (1, "")
    assert "4 nodes x 2 ranks are 4 data-parallel replicas, which take 8 samples at a time" in said
    assert "largest useful number of nodes is 2 (that fit: 1, 2)" in said
    assert "train.global_batch=8 train.optim.lr=0.0141" in said
    larger = ["train.global_batch=8", "train.optim.lr=0.0141"]
    status, _, said = dry(capsys, "submit", config, "--nodes=4", "--ranks-per-node=2", *larger)
    assert status == 0, said


def test_a_batch_that_does_not_divide_is_refused_with_a_way_out(config, capsys):
    words = ["--nodes", "3", "--ranks-per-node", "2", "train.global_batch=8"]
    status, _, said = dry(capsys, "submit", config, *words)
    assert status == 1
    assert "which does not divide train.global_batch=8" in said
    assert "(that fit: 1, 2, 4)" in said
    assert "train.global_batch=12 train.optim.lr=0.0122" in said


def test_all_missing_inputs_are_named_at_once(config, capsys, tmp_path):
    wrong = ["model.text_tokenizer=gone.model", "init.all=runs/gone"]
    status, script, said = dry(capsys, "submit", config, "--nodes", "2", *wrong)
    assert status == 1
    assert script.startswith("#!")
    assert "2 inputs are not there" in said
    assert "a run: model.text_tokenizer=gone.model" in said
    assert "a run: init.all=runs/gone" in said


def test_data_is_looked_into(config, capsys, tmp_path):
    (tmp_path / "wrong.json").write_text('[{"conversations": 3}]')
    wrong = f"data.train=[{{path: {tmp_path / 'wrong.json'}}}]"
    status, _, said = dry(capsys, "submit", config, "--nodes", "2", wrong)
    assert status == 1
    assert "'conversations' is of type int" in said


def test_tensor_parallelism_across_nodes_is_warned_about(config, capsys):
    _, _, said = dry(capsys, "submit", config, "--nodes", "2")
    assert "warning: parallel.tp=2 crosses nodes of 1 ranks" in said
    _, _, said = dry(capsys, "submit", config, "--nodes", "2", "--ranks-per-node", "2")
    assert "crosses" not in said


def test_a_sweep_is_an_array_of_runs(config, capsys, tmp_path):
    sweep = ["--sweep", "train.optim.lr=1e-3,2e-3", "--sweep", "run.seed=1,2"]
    status, script, said = dry(capsys, "submit", config, "--nodes", "2", *sweep)
    assert status == 0, said
    assert "#SBATCH --array=0-3\n" in script
    assert "/a run'/$SLURM_ARRAY_TASK_ID\n" not in script
    assert f"job='{tmp_path}/a run/slurm'/$SLURM_ARRAY_TASK_ID\n" in script
    assert f'{tmp_path}/a run/3: train.optim.lr="2e-3" run.seed=2\n' in said
    status, _, said = dry(capsys, "submit", config, "--nodes", "2", "--sweep", "run.seed=")
    assert status == 1
    assert "wanted a setting and its values" in said


def command(capsys, folder, *words: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
    options = ("--job-dir", str(folder / "job"), "--dry-run", *options)
    return dry(capsys, "submit", *options, "--", *words)


def test_any_command_is_a_job(config, files, capsys, tmp_path):
    status, script, said = command(
        capsys, tmp_path, "data", "index", config, options=("--cpus-per-rank", "3")
    )
    assert status == 0, said
    assert "env --unset=SLURM_PROCID " in script
    assert f"-m megatron_asvr data index {config} --workers 3\n" in script
    status, script, said = command(
        capsys, tmp_path, "tokenizer", "encode", config, options=("--nodes", "2")
    )
    assert status == 0, said
    assert f"-m megatron_asvr tokenizer encode {config}\n" in script
    assert "SLURM_PROCID" not in script
    status, script, said = command(capsys, tmp_path, "preflight", options=("--nodes", "2"))
    assert status == 0, said
    assert "SLURM_PROCID" not in script
    made = ["convert", "export", str(files), "--out", "x y"]
    status, script, said = command(capsys, tmp_path, *made)
    assert status == 0, said
    assert f"convert export {files} --out 'x y'\n" in script


@pytest.mark.parametrize(
    ("words", "options", "why"),
    [
        (["convert", "export", "gone", "--out", "x"], (), "model=gone"),
        (["convert", "export", ".", "--out", "x"], ("--nodes", "2"), "one process"),
        (["eval", "gone", "--data", "gone.json"], (), "data=gone.json"),
        (["chat", "gone"], (), "nothing for a job"),
        (["plan", "7b"], (), "nothing for a job"),
        (["slurm", "ls"], (), "nothing for a job"),
        (["tokenizer", "fit", "--vision", "gone", "--data", ".", "--out", "x"], (), "vision=gone"),
    ],
)
def test_commands_that_cannot_work_are_refused(words, options, why, capsys, tmp_path):
    status, _, said = command(capsys, tmp_path, *words, options=options)
    assert status == 1
    assert why in said


def test_arguments_of_commands_are_checked(capsys, tmp_path):
    with pytest.raises(SystemExit):
        command(capsys, tmp_path, "convert", "export", "run", "--outt", "x")
    assert "--out" in capsys.readouterr().err


def test_containers_see_what_the_configuration_names(config, files, capsys, tmp_path):
    words = ["--nodes", "2", "--container", "a+b:1", "--mount", "/c:/d"]
    status, script, said = dry(capsys, "submit", config, *words)
    assert status == 0, said
    (srun,) = (line for line in script.splitlines() if line.startswith("  srun "))
    assert "--container-image=a+b:1" in srun
    assert f"--container-workdir={Path.cwd()}" in srun
    (mounts,) = (
        word for word in shlex.split(srun.rstrip("\\")) if word.startswith("--container-mounts=")
    )
    pairs = mounts.partition("=")[2].split(",")
    for place in (Path.cwd(), files, tmp_path):
        held = [p for p in pairs if Path(place).is_relative_to(p.split(":")[0])]
        assert held, (place, pairs)
    assert pairs[-1] == "/c:/d"
    assert "\nranks python -m megatron_asvr train" in script


def pipeline(folder: Path, config: str, **steps) -> list[str]:
    path = folder / "steps.yaml"
    path.write_text(json.dumps({"dir": str(folder / "steps"), "steps": steps}))
    return ["pipeline", str(path)]


def test_steps_of_a_pipeline_may_need_what_earlier_ones_make(config, capsys, tmp_path):
    second = f"train {config} 'run.dir={tmp_path}/2' 'init.all={tmp_path}/a run'"
    steps = {
        "index": {"command": f"data index {config}"},
        "first": {"command": f"train {config}", "nodes": 2},
        "second": {"command": second, "nodes": 2, "sbatch": ["mem=0", "exclusive"]},
        "out": {"command": ["convert", "export", f"{tmp_path}/2", "--out", f"{tmp_path}/hf"]},
        "ask": {
            "command": f"eval {tmp_path}/2 --data {config} --out {tmp_path}/x",
            "after": ["second"],
            "nodes": 2,
        },
    }
    status, scripts, said = dry(capsys, *pipeline(tmp_path, config, **steps))
    assert status == 0, said
    assert scripts.count("#!/usr/bin/env bash") == 5
    assert "#SBATCH --mem=0\n#SBATCH --exclusive\n" in scripts
    assert f"not looked into: init.all={tmp_path}/a run comes from first\n" in said
    assert f"not looked into: model={tmp_path}/2 comes from second\n" in said
    assert said.count("after: second\n") == 2
    assert "after: nothing\n" in said
    assert "has no index" not in said  # the first step makes it


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ({"a": {"command": "eval gone --data gone.json"}}, "a: model=gone"),
        ({"a": {"nodes": 2}}, "has no `command:`"),
        ({"a": {"command": "checkpoint ls .", "after": ["b"]}}, "no step above it"),
        ({"a": {"command": "checkpoint ls .", "after": "b"}}, "takes a list"),
        ({}, "wanted `steps:`"),
    ],
)
def test_wrong_pipelines_are_refused(steps, why, config, capsys, tmp_path):
    status, _, said = dry(capsys, *pipeline(tmp_path, config, **steps))
    assert status == 1
    assert why in said


RECIPES = sorted((ROOT / "slurm").glob("*/pipeline.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.parent.name)
def test_recipes_lack_nothing_but_their_files(recipe, capsys, monkeypatch):
    """Everything but what is in the files is checked: arguments, settings, layouts, batches."""
    monkeypatch.chdir(ROOT)
    status, scripts, said = dry(capsys, "pipeline", str(recipe.relative_to(ROOT)))
    _, _, lacking = said.partition("no job before makes them:\n")
    for line in lacking.splitlines():
        assert line.partition("=")[2].startswith(("assets/", "runs/quickstart/", "runs/llava_7b/"))
    assert bool(lacking) == (status == 1), said
    assert "crosses nodes" not in said
    steps = yaml.safe_load(recipe.read_text())["steps"]
    assert scripts.count("#!/usr/bin/env bash\n") == len(steps)
    runs = [step for step in steps.values() if step["command"].startswith("train ")]
    assert said.count("layout: ") == len(runs)


def test_a_time_that_yaml_takes_for_a_number_is_refused(capsys, tmp_path):
    path = tmp_path / "steps.yaml"
    path.write_text("steps: {a: {command: checkpoint ls ., time: 24:00:00}}")
    status, _, said = dry(capsys, "pipeline", str(path))
    assert status == 1
    assert "quote it" in said


def test_an_image_in_a_file_is_named_by_its_whole_path(config, capsys, tmp_path, monkeypatch):
    (tmp_path / "a.sqsh").touch()
    monkeypatch.chdir(tmp_path)
    words = ["submit", config, "--nodes", "2", "--container"]
    _, script, _ = dry(capsys, *words, "a.sqsh")
    assert f" --container-image={tmp_path}/a.sqsh " in script  # else pyxis asks a registry
    _, script, _ = dry(capsys, *words, "a.sqsh", "--container-runtime", "apptainer")
    assert f" {tmp_path}/a.sqsh python -m megatron_asvr train" in script
    status, _, said = dry(capsys, *words, "b.sqsh")
    assert status == 1
    assert "b.sqsh: there is no such file" in said


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("2", 120), ("2:30", 150), ("1:00:00", 3600), ("1-0", 86_400), ("1-2:30", 95_400)),
        *(("1-0:0:5", 86_405), ("UNLIMITED", None), ("", None)),
    ],
)
def test_time_limits(text, seconds):
    assert time_s(text) == seconds


def test_a_warning_before_the_start_is_refused(config, capsys):
    status, _, said = dry(capsys, "submit", config, "--nodes", "2", "--time", "3")
    assert status == 1
    assert "told to save before they start" in said
    status, _, said = dry(capsys, "submit", config, "--nodes", "2", "--time", "3:01")
    assert status == 0, said


def test_ranks_that_never_fit_are_told_so(config, capsys):
    status, _, said = dry(capsys, "submit", config, "--nodes", "1", "--gpus-per-node", "8")
    assert status == 1
    assert "With 8 ranks a node that is so on any number of nodes. Or take a larger batch" in said


def test_a_run_that_an_earlier_step_begins_need_not_have_weights_yet(config, capsys, tmp_path):
    (tmp_path / "a run").mkdir()
    second = f"train {config} 'run.dir={tmp_path}/2' 'init.all={tmp_path}/a run'"
    steps = {"first": {"command": f"train {config}", "nodes": 2}}
    steps["second"] = {"command": second, "nodes": 2}
    status, _, said = dry(capsys, *pipeline(tmp_path, config, **steps))
    assert status == 0, said
    assert f"not looked into: init.all={tmp_path}/a run comes from first\n" in said


def test_what_a_container_cannot_mount_is_refused(config, capsys, tmp_path):
    words = ["submit", config, "--nodes=2", "--container=a:1", f"run.dir={tmp_path}/x/run"]
    for name, runtime, wanted in (
        ("a b", "pyxis", 1),
        ("a b", "apptainer", 0),
        ("a,b", "pyxis", 1),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        more = [
            f"data.cache_dir={json.dumps(str(tmp_path / name))}",
            f"--container-runtime={runtime}",
        ]
        if runtime == "apptainer":
            more.append("--container=docker://a:1")
        status, _, said = dry(capsys, *words, *more)
        assert (name, runtime, status) == (name, runtime, wanted), said


def test_a_folder_without_jobs_is_said_to_be_one(capsys, tmp_path):
    assert main(["slurm", "ls", str(tmp_path)]) == 1
    assert "no job was submitted from below" in capsys.readouterr().err


def test_a_folder_with_logs_is_used_again(tmp_path):
    (tmp_path / "12").mkdir()
    for name in ("12.log", "12_0.log", "exclude", "12/config.yaml", "12/crashes"):
        (tmp_path / name).touch()
    clear(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"12.log", "12_0.log", "12/crashes"}
