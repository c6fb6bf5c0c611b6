"""The cost model against the operations that torch counts in a real step."""

import dataclasses
import math

from megatron_asvr.platforms import kernels, mcore  # noqa: F401

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_asvr.parallel.costs import Counts, rates, tokenizer_cost
from megatron_asvr.precision.local import attention_rule
from megatron_asvr.train.passes import backward
from megatron_asvr.train.work import Work
from tests.language_cases import one_rank
from tests.run_cases import CODEBOOK_SIZES, LENGTH, Bench, config, micro_batch, tokenizer

ALL = ["vision_encoder", "projector", "language_model", "visual_head"]
MIXTURE = {
    "model__language__family": "mixtral",
    "model__language__num_experts": 3,
    "model__language__expert_ffn_hidden_size": 20,
}
IMAGES, ROWS = 3, 2


def added(total_shape, a_shape, b_shape, *_, out_shape=None, **__):
    """Operations of ``addmm_`` and ``baddbmm_``, which torch's counter does not know."""
    return 2 * math.prod(a_shape) * b_shape[-1]


def counted(bench):
    """Products of a step's forward and backward pass, attention as single ones."""
    batches = [micro_batch(bench.run, 1, images=(2, 1))]
    if (share := bench.run.loss.visual_positions) < 1:
        drawn = slice(None, None, round(1 / share))
        batches[0].visual_positions_M = batches[0].visual_positions_M[drawn]
        batches[0].visual_patches_M = batches[0].visual_patches_M[drawn]
    unknown = dict.fromkeys([torch.ops.aten.addmm_, torch.ops.aten.baddbmm_], added)
    counter = FlopCounterMode(display=False, custom_mapping=unknown)
    for chunk in bench.wrapped:
        chunk.zero_grad_buffer()
    loss = bench.loss(batches)
    with counter, sdpa_kernel(SDPBackend.MATH), kernels.imagined(False):
        backward(bench.wrapped, batches, loss)
    return counter.get_total_flops(), batches[0]


def dense(batch):
    """What the CPU's kernels work on: all pairs of every document, padding like one more."""
    lengths = [n for row in attention_rule(batch, sliding_window=None).tolist() for n in row]
    return Counts(
        images=batch.num_images,
        patches=batch.image_positions_P.numel(),
        positions=ROWS * LENGTH,
        pairs=sum(n * n for n in lengths),
        labels=batch.num_text_targets,
        codes=batch.visual_positions_M.numel(),
    )


def unmasked_depths(run, batch):
    """What the CPU's attention over depths multiplies above its causal triangle."""
    head, depth = run.model.visual_head, len(CODEBOOK_SIZES)
    passes = 3 + run.train.recompute_visual_head
    pairs = depth * (depth - 1) / 2
    rows = batch.visual_positions_M.numel()
    return passes * 4 * head.width * head.num_layers * pairs * rows


VARIANTS = {
    "all trained": {"trainable": ALL},
    "the encoder frozen": {},
    "stage 1": {"trainable": ["projector", "visual_head"]},
    "the head alone": {"trainable": ["visual_head"]},
    "the language model alone": {"trainable": ["language_model"]},
    "the encoder alone": {"trainable": ALL[:1]},
    "recomputed": {"recompute": "full", "recompute_visual_head": True},
    "attention recomputed": {"recompute": "selective"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_rates_are_the_products_of_a_step(variant):
    run = config(**{f"train__{name}": value for name, value in VARIANTS[variant].items()})
    with one_rank() as groups:
        found, batch = counted(Bench(run, groups))
    parts = rates(run, CODEBOOK_SIZES).parts(dense(batch))
    assert sum(parts.values()) + unmasked_depths(run, batch) == found
    useful = rates(run, CODEBOOK_SIZES, useful=True).parts(dense(batch))
    again = {name for name in parts if parts[name] != useful[name]}
    assert again == {
        "recomputed": {"language_model", "visual_head"},
        "attention recomputed": {"language_model"},
    }.get(variant, set())


def test_positions_that_are_not_drawn_cost_the_visual_head_nothing():
    run = config(loss__visual_positions=0.5)
    with one_rank() as groups:
        bench = Bench(run, groups)
        found, batch = counted(bench)
        counting = Work(run, tokenizer(run.model.vision), groups=groups)
        *_, drawn, _ = counting.counts([batch])
    assert drawn == IMAGES * run.model.vision.num_patches / 2
    all_positions = dataclasses.replace(dense(batch), codes=2 * drawn)
    parts = rates(run, CODEBOOK_SIZES).parts(all_positions)
    assert sum(parts.values()) + unmasked_depths(run, batch) == found


def test_a_mixture_multiplies_its_chosen_experts():
    run = config(**MIXTURE)
    with one_rank() as groups:
        found, batch = counted(Bench(run, groups))
    parts = rates(run, CODEBOOK_SIZES).parts(dense(batch))
    assert sum(parts.values()) + unmasked_depths(run, batch) == found


def test_the_baseline_without_a_visual_loss_has_no_visual_head():
    run = config(loss__visual_weight=0.0, train__trainable=ALL[1:3])
    with one_rank() as groups:
        found, batch = counted(Bench(run, groups))
    parts = rates(run, ()).parts(dense(batch))
    assert (sum(parts.values()), parts["visual_head"]) == (found, 0)


@pytest.mark.parametrize("kind", ["semantic", "appearance"])
def test_the_tokenizer_costs_its_encoder_and_its_search(kind):
    vision = config(data__codes="online").model.vision
    made = tokenizer(vision, kind=kind, feature_layer=-2 if kind == "semantic" else None)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        made.encode(torch.zeros(IMAGES, 3, vision.image_size, vision.image_size))
    encoder = made.encoder and made.encoder.config
    cost = tokenizer_cost(config(), CODEBOOK_SIZES, encoder, made.width)
    assert IMAGES * cost == counter.get_total_flops()
