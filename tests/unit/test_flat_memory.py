"""What a step needs beside weights, gradients and optimizer state does not grow with the codes."""

import functools
from dataclasses import replace

from benchmarks.workload import MID
from megatron_asvr.model.tokenizer import TokenizerConfig
from megatron_asvr.planner.rehearsal import Passes, Shape
from megatron_asvr.planner.shards import stages

SHAPE = Shape(rows=1, length=1600, images=4, texts=300, codes=1024)


@functools.cache
def passes(sizes: tuple[int, ...]) -> Passes:
    """The model's own code on fake tensors of the benchmark's mid configuration."""
    config, vision = MID.config("fp32"), MID.model.vision
    tokenizer = TokenizerConfig(
        kind="semantic",
        vision=replace(vision, num_layers=1, feature_layer=0),
        feature_layer=0,
        codebook_sizes=sizes,
    )
    ((chunk,),) = stages(config, 1, tokenizer, micro_batch=(SHAPE, "cpu"))
    return chunk.passes


def test_peaks_are_flat_in_the_size_of_a_codebook():
    small, large = (passes((size,) * 8) for size in (16384, 65536))
    assert large.kept == small.kept
    assert large.backward == small.backward
    assert large.forward <= small.forward + 2**26  # a chunk of logits (output_loss.CHUNK_BYTES)


def test_peaks_are_flat_in_codewords_when_depths_are_traded_for_them():
    few, many = (passes((size,) * depth) for depth, size in ((4, 32768), (8, 16384)))
    # Activations of the depth transformer exist for at most PART_BYTES at a time.
    assert abs(many.forward - few.forward) < 2**26
    assert many.kept - few.kept < 2**22
