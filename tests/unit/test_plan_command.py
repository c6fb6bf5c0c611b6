"""`asvr plan`: the table, the JSON, and when it says no."""

import json

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process for megatron-core)

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches
from transformers import SiglipVisionConfig, SiglipVisionModel

from megatron_asvr.cli.main import main
from megatron_asvr.parallel.groups import imagined
from megatron_asvr.parallel.plan import make_plan
from megatron_asvr.planner.memory import passes
from megatron_asvr.planner.rehearsal import largest
from tests.run_cases import CODEBOOK_SIZES, config, tokenizer

SEVEN = "slurm/llava_7b/stage2.yaml"
SEVENTY = "slurm/llama3_70b/stage2.yaml"
SMALL = (  # tests/unit/test_planner_sizes.py has real sizes
    *("model.vision.image_size=16", "model.vision.patch_size=8", "model.vision.hidden_size=16"),
    *("model.vision.num_layers=3", "model.vision.num_heads=2", "model.vision.ffn_hidden_size=24"),
    *("model.language.hidden_size=64", "model.language.num_heads=8", "data.max_length=64"),
    *("model.language.num_kv_heads=8", "model.language.ffn_hidden_size=96"),
    *("model.language.num_layers=4", "model.language.vocab_size=200", "train.micro_batch=1"),
    *("model.visual_head.width=32", "model.visual_head.num_heads=2"),
)


def report(capsys, *words: str) -> dict:
    main(["plan", *words, *SMALL, "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_table_has_a_line_for_every_stage(capsys):
    assert main(["plan", SEVENTY, "--nodes", "8", "--gpus-per-node", "8", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["0", "1", "2", "3"]
    assert all(line.endswith("fits") for line in lines[2:-1])
    assert "8 x 16,384 codes assumed: runs/llava_7b/tokenizer is not there" in lines[0]
    assert lines[-1].endswith("NCCL 2, DALI 2, gaps between tensors 2; not measured)")


def test_what_does_not_fit_is_said_and_fails(capsys):
    words = ("--gpu-gb", "9", "--reserve-gb", "9")
    assert main(["plan", SEVEN, *SMALL, *words]) == 1
    assert "TOO MUCH" in capsys.readouterr().out
    assert not report(capsys, SEVEN, *words)["fits"]
    assert report(capsys, SEVEN)["fits"]


def test_recomputation_leaves_less_for_the_backward_pass(capsys):
    none, selective, full = (
        report(capsys, SEVEN, f"train.recompute={how}")["stages"][0]
        for how in ("none", "selective", "full")
    )
    assert none["kept"] > selective["kept"] > full["kept"]
    assert full["backward"] > none["backward"]  # a layer's activations exist again


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([SEVENTY, "--nodes", "3"], "24"),
        ([SEVEN, "model.language.family=mixtral", "model.language.num_experts=8"], "mixture"),
    ],
)
def test_what_cannot_be_planned_is_refused(words, said, capsys):
    assert main(["plan", *words]) == 1
    assert said in capsys.readouterr().err


def test_codes_are_those_of_the_run_s_tokenizer(tmp_path, capsys):
    run = config()
    visual = tokenizer(run.model.vision)
    visual.save(tmp_path)
    found = report(capsys, SEVEN, f"model.visual_tokenizer={tmp_path}")
    assert found["codes"] == f"codes of {tmp_path}"
    assert found["stages"][0]["state"]["constants"] == 4 * sum(CODEBOOK_SIZES) * visual.width


def test_an_online_tokenizer_is_counted_once_where_files_say_that_it_is_the_encoder(
    tmp_path, capsys
):
    vision, folder, encoder = config().model.vision, tmp_path / "visual", tmp_path / "encoder"
    visual = tokenizer(vision)
    visual.save(folder)
    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            intermediate_size=vision.ffn_hidden_size,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            vision_use_head=False,
        )
    )
    prefix = next(iter(theirs.state_dict())).partition("embeddings.")[0]
    state = visual.encoder.state_dict()
    theirs.load_state_dict({prefix + name: x for name, x in state.items()})
    theirs.save_pretrained(encoder)
    words = ["data.codes=online", "train.precision=fp32", f"model.visual_tokenizer={folder}"]
    joined, apart = (
        report(capsys, SEVEN, *words, "init.all=null", f"init.vision_encoder={source}")
        for source in (encoder, tmp_path / "nowhere")
    )
    assert "; one pass for features and codes" in joined["codes"]
    assert apart["codes"].endswith("; an encoder of its own is assumed for the tokenizer")
    held, more = (plan["stages"][0]["state"]["constants"] for plan in (joined, apart))
    visual.leave_out_unused()
    assert more - held == sum(x.nbytes for x in visual.encoder.parameters())


@pytest.mark.parametrize(("pp", "vpp"), [(2, None), (4, None), (2, 2), (4, 2)])
@pytest.mark.parametrize("batches", [1, 4, 8])
def test_micro_batches_in_flight_are_those_of_megatron_s_schedule(pp, vpp, batches):
    run = config(
        parallel__pp=pp,
        parallel__vpp=vpp,
        model__language__num_layers=8,
        train__global_batch=2 * batches,
    )
    number = batches if vpp is None else -(-batches // pp) * pp  # empty ones are added
    plan = make_plan(run, pp, CODEBOOK_SIZES)
    for stage in range(pp):
        flights = passes(run, pp, stage)
        if vpp is None:
            assert sum(flights.values()) == min(pp - stage, number)
            continue
        with imagined(plan, stage):
            total, _, warm_up, _ = get_pp_rank_microbatches(number, vpp, pp, False)
        assert sum(flights.values()) == min(total, warm_up + 1)


def test_the_largest_micro_batch():
    plain = largest(config(data__max_length=64))
    assert (plain.rows, plain.length, plain.images) == (2, 64, 2)
    assert (plain.texts, plain.codes) == (2 * 64 - 2 * 4, 2 * 4)
    packed = largest(config(data__max_length=64, data__packing=True, data__pack_length=100))
    # as many pictures of four patches as fit, and text on every position: the most of each
    assert (packed.rows, packed.length, packed.images) == (2, 100, 50)
    assert (packed.texts, packed.codes) == (200, 200)
