"""What a step's passes cost when images are encoded twice, once, or not at all, and in part.

    python -m benchmarks.once [--short] [--rounds N]

One process trains one model on the samples of one step, forward and backward without the
optimizer; the ways take turns. CPU-seconds, medians.
"""

import argparse
import dataclasses
import statistics
import time

from megatron_asvr.platforms import mcore  # noqa: F401

import numpy as np
import torch

from benchmarks.sides import micro_batch, one_rank
from benchmarks.workload import WORKLOADS, Workload, samples
from megatron_asvr.batch import MicroBatch
from megatron_asvr.config.schema import DataConfig
from megatron_asvr.data.subsample import drawn
from megatron_asvr.model.asvr import AsvrModel, build_model
from megatron_asvr.model.tokenizer import TokenizerConfig, VisualTokenizer
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.train.optim import wrap
from megatron_asvr.train.passes import backward
from megatron_asvr.train.step import agree, loss_function

SHARE = 0.25  # of the positions, in the last way


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description="Cost of encoding twice, once and not at all.")
    parser.add_argument("--short", action="store_true", help="small sizes, one round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = WORKLOADS["short" if args.short else "mid"]
    with one_rank() as groups:
        found = measure(load, groups, 1 if args.short else args.rounds)
    print(f"CPU-seconds of forward and backward passes, {len(found['two passes'])} rounds")
    for name, values in found.items():
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name:45} {statistics.median(values):7.2f}  ({spread})")


def measure(load: Workload, groups: Groups, rounds: int) -> dict[str, list[float]]:
    """CPU-seconds of every round, by way."""
    config = dataclasses.replace(load.config("fp32"), data=DataConfig(codes="online"))
    tokenizer = fitted(load)
    model = build_model(config, groups=groups, tokenizer=tokenizer)
    model.vision_encoder.load_state_dict(tokenizer.encoder.state_dict())
    if "one pass" not in model.images.join(tokenizer):
        raise SystemExit("the encoder is the tokenizer's, and yet they were not joined")
    wrapped = wrap([model], config.train.optim)
    whole = micro_batch(load, samples(load, 0), None)
    agreement = agree([whole], stop=False, groups=groups)
    loss = loss_function(config.loss, agreement, num_micro_batches=1)
    found: dict[str, list[float]] = {}
    every = ways(model, whole)
    backward(wrapped, [whole], loss)  # warms up
    for _ in range(rounds):
        for name, (joined, batch) in every.items():
            model.images.joined = joined
            wrapped[0].zero_grad_buffer()
            started = time.process_time()
            backward(wrapped, [batch], loss)
            found.setdefault(name, []).append(time.process_time() - started)
    return found


def ways(model: AsvrModel, whole: MicroBatch) -> dict[str, tuple[bool, MicroBatch]]:
    """Whether one pass serves both, and the micro-batch, by way."""
    images, patches = model.images, model.run_config.model.vision.num_patches
    with torch.no_grad():
        cached = dataclasses.replace(whole, codes_PD=images.codes(whole))
        features = {"features_INF": images.features(whole), "pixel_values_ICHW": None}
    masks = [
        drawn(patches, SHARE, seed=0, spot=image, image=0) for image in range(whole.num_images)
    ]
    rows = torch.from_numpy(np.concatenate(masks))
    some = {
        "visual_positions_M": whole.visual_positions_M[rows],
        "visual_patches_M": whole.visual_patches_M[rows],
        "visual_left_out": int((~rows).sum()),
        "visual_scale": 1 / SHARE,
    }
    return {
        "two passes": (False, whole),
        "one pass": (True, whole),
        "codes cached": (False, cached),
        "codes and features cached": (False, dataclasses.replace(cached, **features)),
        f"the same, {SHARE:.0%} of the positions": (
            False,
            dataclasses.replace(cached, **features, **some),
        ),
    }


def fitted(load: Workload) -> VisualTokenizer:
    """A tokenizer with random weights and codebooks."""
    vision = load.model.vision
    description = TokenizerConfig(
        kind="semantic",
        vision=vision,
        feature_layer=vision.feature_layer,
        codebook_sizes=load.codebook_sizes,
    )
    tokenizer = VisualTokenizer(description)
    generator = torch.Generator().manual_seed(1)
    tables = [torch.randn(k, tokenizer.width, generator=generator) for k in load.codebook_sizes]
    tokenizer.set_codebooks(tables)
    return tokenizer


if __name__ == "__main__":
    main()
