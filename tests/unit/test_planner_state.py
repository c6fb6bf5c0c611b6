"""The planner's bytes against megatron-core's own buffers and optimizers, and the whole model."""

import dataclasses
import functools

import pytest

from megatron_asvr.config.check import check
from megatron_asvr.config.load import load
from megatron_asvr.model.asvr import AsvrModel
from megatron_asvr.model.tokenizer import TokenizerConfig, VisualTokenizer
from megatron_asvr.model.vision import SiglipEncoder
from megatron_asvr.parallel.groups import imagined
from megatron_asvr.parallel.plan import make_plan
from megatron_asvr.planner import state as planned_state
from megatron_asvr.planner.memory import plan_memory
from megatron_asvr.planner.parameters import count_parameters, left_out
from megatron_asvr.planner.shards import stages, whole
from megatron_asvr.planner.state import state
from megatron_asvr.train import optim
from tests.language_cases import one_rank
from tests.run_cases import CODEBOOK_SIZES, config, tokenizer

RECIPES = {
    "slurm/llava_7b/stage1.yaml": 8,
    "slurm/llava_7b/stage2.yaml": 8,
    "slurm/llava_13b/stage1.yaml": 16,
    "slurm/llava_13b/stage2.yaml": 16,
    "slurm/llama3_70b/stage1.yaml": 32,
    "slurm/llama3_70b/stage2.yaml": 64,
}
LAYOUTS = {
    "one": (1, {}),
    "dp3": (3, {"train__global_batch": 6}),
    "tp2": (4, {"parallel__tp": 2, "parallel__sp": True}),
    "pp2": (4, {"parallel__pp": 2}),
    "cp2": (4, {"parallel__cp": 2}),
    "tied": (4, {"parallel__pp": 2, "model__language__tied_embeddings": True}),
    "stage1": (2, {"train__trainable": ["projector", "visual_head"]}),
    "overlap": (4, {"train__optim__overlap_grad_reduce": True, "parallel__pp": 2}),
    "encoder": (2, {"train__trainable": ["vision_encoder"]}),
}
BUCKET = 2000  # elements
WAYS = [("bf16", True), ("fp32", True), ("bf16", False), ("fp32", False)]


def quantised(run) -> TokenizerConfig:
    return TokenizerConfig(
        kind="semantic", vision=run.model.vision, feature_layer=-2, codebook_sizes=CODEBOOK_SIZES
    )


def of_megatron(run, world: int, rank: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state that megatron-core makes on a rank."""
    plan = make_plan(run, world, CODEBOOK_SIZES)
    with imagined(plan, rank) as groups:
        model = AsvrModel(run, groups=groups, tokenizer=tokenizer(run.model.vision))
        model.leave_out_unused()
        (wrapped,) = optim.wrap([model], run.train.optim)
        buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
        optimizer = optim.make_optimizer([wrapped], run.train)
        places = {x.untyped_storage().data_ptr(): x for x in model.parameters()}
        weights = sum(x.untyped_storage().nbytes() for x in places.values())
        gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
        updated = [x for group in optimizer.param_groups for x in group["params"]]
        copied = sum(x.nbytes for x in updated) if run.train.precision == "bf16" else 0
    return weights, gradients, copied + 2 * 4 * sum(x.numel() for x in updated)


@pytest.mark.parametrize(("precision", "distributed"), WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_those_of_megatron_s_buffers(layout, precision, distributed, monkeypatch):
    without = functools.partial(optim.get_megatron_optimizer, use_gloo_process_groups=False)
    monkeypatch.setattr(optim, "get_megatron_optimizer", without)  # gloo cannot be imagined
    # Small buckets, as this model is small.
    settings = functools.partial(optim.DistributedDataParallelConfig, bucket_size=BUCKET)
    monkeypatch.setattr(optim, "DistributedDataParallelConfig", settings)
    monkeypatch.setattr(planned_state, "bucket_size", lambda dp: BUCKET)
    world, changes = LAYOUTS[layout]
    run = config(**changes, train__precision=precision, train__optim__distributed=distributed)
    for stage, chunks in enumerate(stages(run, world, quantised(run))):
        p = run.parallel
        copies = world // (p.tp * p.pp)  # data- and context-parallel
        for replica in range(copies):
            rank = stage * (world // p.pp) + replica * p.tp
            found = state(chunks, run, world, replica=replica)
            planned = (found.weights, found.gradients, found.optimizer)
            assert planned == of_megatron(run, world, rank), (stage, replica)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_ranks_of_a_recipe_hold_the_whole_model(recipe):
    world = RECIPES[recipe]
    run = check(load(recipe), world)
    codes = TokenizerConfig(
        kind="semantic",
        vision=run.model.vision,
        feature_layer=-2,
        codebook_sizes=(16384,) * 8,
    )
    found = stages(run, world, codes)
    counts = count_parameters(run.model, codes.codebook_sizes, codes.width)
    assert sum(whole(found, run).values()) == sum(counts.values()) - left_out(run.model.vision)
    p = run.parallel
    copies = world // (p.tp * p.pp)
    for chunks in found:
        for shard in (shard for chunk in chunks for shard in chunk.shards):
            # split over the ranks of the group, perhaps with padding, or a copy on each
            assert shard.numbers == shard.full or 0 <= p.tp * shard.numbers - shard.full < 64 * 8192
        shares = [state(chunks, run, world, replica=r).optimizer for r in range(copies)]
        assert sum(shares) == 12 * state(chunks, run, world).trained  # fp32 weight, two moments


def test_ranks_of_a_tensor_parallel_group_hold_as_much():
    run = config(parallel__tp=2, parallel__sp=True, parallel__pp=2)
    first, second = (stages(run, 4, quantised(run), tp_rank=rank) for rank in (0, 1))
    assert first == second


def test_a_run_without_a_visual_loss_has_no_head_and_no_codes():
    run = config(loss__visual_weight=0.0)
    ((chunk,),) = stages(run, 1, None)
    assert not chunk.constants
    assert not chunk.visual_loss
    assert not [s.name for s in chunk.shards if s.name.startswith("visual_head")]


def test_online_codes_need_the_tokenizer_on_the_last_stage():
    run = config(parallel__pp=2)
    online = dataclasses.replace(run, data=dataclasses.replace(run.data, codes="online"))
    visual = tokenizer(run.model.vision)
    assert visual.leave_out_unused() > 0
    weights = sum(x.nbytes for x in [*visual.parameters(), *visual.buffers()])
    (before,), (with_cache,) = stages(run, 2, quantised(run))
    (same,), (with_encoder,) = stages(online, 2, quantised(run))
    assert same.constants == before.constants == 0
    assert with_encoder.constants - with_cache.constants == weights


@pytest.mark.parametrize("its", [-3, -2, -1])
def test_a_tokenizer_that_is_the_encoder_is_held_once(its):
    """Against the storages of a model that was joined as a run does it."""
    run = config(data__codes="online", train__trainable=["projector", "language_model"])
    visual = VisualTokenizer(dataclasses.replace(quantised(run), feature_layer=its))
    with one_rank() as groups:
        model = AsvrModel(run, groups=groups, tokenizer=visual)
        model.vision_encoder.load_state_dict(visual.encoder.state_dict())
        model.leave_out_unused()
        visual.leave_out_unused()
        every = [*model.parameters(), *model.buffers(), *visual.parameters(), *visual.buffers()]
        apart = sum(x.nbytes for x in every)
        assert model.images.join(visual).startswith("one pass")
        places = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in every}
    held = []
    for joined in (True, False):
        ((chunk,),) = stages(run, 1, visual.config, joined=joined)
        held.append(sum(s.numbers * s.width for s in chunk.shards) + chunk.constants)
    assert held == [sum(places.values()), apart]


def test_a_joined_tokenizer_costs_no_second_pass(monkeypatch):
    run = config(data__codes="online", train__trainable=["projector", "language_model"])
    plain, numbers = SiglipEncoder.hidden_states, []
    for joined in (True, False):
        passes = []

        def counted(encoder, *args, passes=passes):
            passes.append(1)
            return plain(encoder, *args)

        monkeypatch.setattr(SiglipEncoder, "hidden_states", counted)
        plan_memory(run, 1, quantised(run), joined=joined)
        numbers.append(len(passes))
    assert numbers == [1, 2]


@pytest.mark.parametrize("alone", [False, True])
def test_virtual_stages_hold_the_whole_model_once(alone):
    run = config(
        parallel__pp=2,
        parallel__vpp=2,
        parallel__head_alone=alone,
        model__language__num_layers=5,
    )
    found = stages(run, 2, quantised(run))
    counts = count_parameters(run.model, CODEBOOK_SIZES, run.model.vision.hidden_size)
    assert sum(whole(found, run).values()) == sum(counts.values()) - left_out(run.model.vision)
    chunks = [found[place % 2][place // 2] for place in range(4)]  # in the model's order
    assert sum(chunk.layers for chunk in chunks) == 5
    assert [chunk.images for chunk in chunks] == [True, False, False, False]
    assert [chunk.text_loss for chunk in chunks] == [False, False, alone, not alone]
    assert [chunk.visual_loss for chunk in chunks] == [False, False, False, True]
