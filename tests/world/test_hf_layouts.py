"""Every family: from a folder of transformers into TP x PP ranks and out again, byte for byte."""

import json
from dataclasses import replace
from pathlib import Path

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron)

import pytest
import torch
from torch import Tensor

from megatron_asvr.cli.main import main
from megatron_asvr.config.load import save as write_config
from megatron_asvr.config.schema import Config, ModelConfig
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.hf.export import export
from megatron_asvr.hf.importer import read_folder
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.model import sharding
from megatron_asvr.model.language import LanguageModel
from megatron_asvr.parallel import groups as process_groups
from megatron_asvr.parallel.plan import ParallelPlan
from tests.language_cases import language_logits
from tests.run_data import make_files, run_config
from tests.unit import hf_models
from tests.unit.test_hf_families import LANGUAGES, random_model, tensors

pytestmark = pytest.mark.world

PLAN = ParallelPlan(tp=2, pp=2, sp=True, world=4)
LENGTH, VOCABULARY = 40, 331  # a vocabulary that nothing divides
PREFIX = "language_model."
FAMILIES = (
    "llama",
    "llama_tied_no_gqa",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen3_moe",
    "llama3",
    "yarn",
)


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def through_ranks(folder: str, tokenizer: str, cases: list[str]) -> dict[str, Tensor]:
    """Logits of every case; exports it beside the folder it came from."""
    groups = process_groups.initialize(PLAN, 60.0)
    found = {}
    for case in cases:
        source = read_folder(Path(folder, case))
        model = LanguageModel(
            source.language,
            groups=groups,
            dtype=torch.float32,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
        )
        sharding.load_weights(model, source, groups=groups, prefix=PREFIX)
        found[case] = language_logits(model, tokens(), groups=groups)
        state = dict(sharding.full_state(model, groups=groups, prefix=PREFIX))
        if groups.rank == 0:
            config = Config(model=ModelConfig(language=source.language))
            out = Path(folder, f"{case}_out")
            export(state.items(), config, tokenizer=tokenizer, out=out, kind="text")
    process_groups.destroy()
    return found


def test_every_family_goes_through_tensor_and_pipeline_ranks(tmp_path):
    text = TextTokenizer.train(hf_models.CORPUS * 9, tmp_path / "text.model", vocab_size=310)
    wanted = {}
    for case in FAMILIES:
        language = replace(LANGUAGES[case], max_positions=256, vocab_size=VOCABULARY)
        model = random_model(language)
        model.save_pretrained(tmp_path / case)
        with torch.no_grad():
            wanted[case] = model(input_ids=tokens(), use_cache=False).logits
    args = (str(tmp_path), str(text.path), list(FAMILIES))
    found = run_ranks(through_ranks, args, PLAN.world, timeout_s=300.0)
    for case in FAMILIES:
        torch.testing.assert_close(
            found[case].transpose(0, 1), wanted[case], rtol=0, atol=1e-4, msg=case
        )
        (out,) = tmp_path.glob(f".{case}_out*")
        before, after = tensors(tmp_path / case), tensors(out)
        assert before.keys() == after.keys(), case
        assert all(torch.equal(before[name], after[name]) for name in before), case


def test_a_whole_model_goes_through_tensor_and_pipeline_ranks(tmp_path, capsys):
    """Out of one run, into another on TP2 x PP2 that learns nothing, and out again."""
    files = make_files(tmp_path / "files")
    asked = ["--data", str(files / "eval.json"), "--images", str(files / "images")]
    first, second = tmp_path / "first", tmp_path / "second"
    changes = {
        "init__all": str(first / "hf"),
        "parallel": {"tp": 2, "pp": 2, "sp": True},
        "train__optim__lr": 1e-60,  # nothing, in fp32
        "train__trainable": ["vision_encoder", "projector", "visual_head", "language_model"],
    }
    for run, more in ((first, {}), (second, changes)):
        write_config(run_config(files, run / "run", train__steps=1, **more), tmp_path / "run.yaml")
        assert main(["train", str(tmp_path / "run.yaml")]) == 0
        assert main(["convert", "export", str(run / "run"), "--out", str(run / "hf")]) == 0
    assert main(["convert", "verify", str(first / "hf"), str(second / "hf")]) == 0
    capsys.readouterr()
    full = ["convert", "verify", str(second / "run"), str(second / "hf"), "--verify", "full"]
    assert main([*full, *asked, "parallel.tp=2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["logits_max_abs"] < 1e-4
    assert report["num_answers_equal"] == report["num_samples"] > 0
    names = sorted(path.name for path in (first / "hf").glob("*.safetensors"))
    assert "visual_head.safetensors" in names
    for name in names:
        assert (first / "hf" / name).read_bytes() == (second / "hf" / name).read_bytes(), name
