"""Our side of `benchmarks.step`, and the weights and codes that both sides start from."""

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from megatron_asvr.platforms import mcore, select  # noqa: F401  (mcore prepares the process)

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.processes import Step, state_bytes, tensor_bytes
from benchmarks.workload import BEFORE, Sample, Workload, samples
from megatron_asvr.batch import IGNORE, MicroBatch
from megatron_asvr.config.schema import PrecisionConfig
from megatron_asvr.model import sharding
from megatron_asvr.model.asvr import AsvrModel, build_model
from megatron_asvr.model.tokenizer import TokenizerConfig, VisualTokenizer
from megatron_asvr.parallel import groups as process_groups
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.plan import ParallelPlan
from megatron_asvr.train import step as train_steps
from megatron_asvr.train.optim import make_optimizer, wrap
from megatron_asvr.train.step import agree, loss_function, train_step


@contextlib.contextmanager
def one_rank() -> Iterator[Groups]:
    """Process groups of a world of one."""
    select()[0].per_rank(1)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield process_groups.initialize(ParallelPlan(), 600.0)
        finally:
            dist.destroy_process_group()


def prepare(load: Workload, args: argparse.Namespace) -> None:
    """Draw the weights, make a tokenizer, and compute the codes of all images, as a cache would."""
    description = TokenizerConfig(
        kind="semantic",
        vision=load.model.vision,
        feature_layer=load.model.vision.feature_layer,
        codebook_sizes=load.codebook_sizes,
    )
    tokenizer = VisualTokenizer(description)
    generator = torch.Generator().manual_seed(1)
    for name, weight in tokenizer.encoder.named_parameters():
        scale = 0.05 if weight.dim() > 1 else 0.02
        base = float("norm" in name and name.endswith("weight"))
        weight.copy_(base + scale * torch.randn(weight.shape, generator=generator))
    scales = [0.7**level for level in range(len(load.codebook_sizes))]
    tokenizer.set_codebooks(
        [
            scale * torch.randn(size, tokenizer.width, generator=generator)
            for size, scale in zip(load.codebook_sizes, scales, strict=True)
        ]
    )
    tokenizer.save(args.folder / "tokenizer")
    with one_rank() as groups:
        model = build_model(load.config("fp32"), groups=groups, tokenizer=tokenizer)
        state = {name: x.contiguous() for name, x in sharding.full_state(model, groups=groups)}
        save_file(state, args.folder / "weights.safetensors")
    codes = {}
    for number in range(args.steps):
        pixels = [s.pixels_CHW for s in samples(load, number) if s.pixels_CHW is not None]
        codes[str(number)] = tokenizer.encode(torch.stack(pixels)).flatten(0, 1)
    save_file(codes, args.folder / "codes.safetensors")


def ours(
    load: Workload, args: argparse.Namespace, groups: Groups, watch: Any
) -> tuple[Step, Callable[[], float]]:
    """A step of this project, and the bytes of weights, gradients and optimizer state."""
    config = load.config("bf16" if args.side == "bf16" else "fp32")
    config = dataclasses.replace(config, precision=PrecisionConfig(kernels=args.side != "torch"))
    tokenizer = VisualTokenizer.load(args.folder / "tokenizer")
    model = build_model(config, groups=groups, tokenizer=tokenizer)
    del tokenizer
    weights = load_file(args.folder / "weights.safetensors")
    sharding.load_weights(model, weights.get, groups=groups)
    del weights
    codes = load_file(args.folder / "codes.safetensors")
    watch_parts(model, watch)
    wrapped = wrap([model], config.train.optim)
    optimizer = make_optimizer(wrapped, config.train)

    def step(number: int) -> list[float]:
        batches = [packed(micro_batch(load, samples(load, number), codes[str(number)]))]
        agreement = agree(batches, stop=False, groups=groups)
        loss = loss_function(config.loss, agreement, num_micro_batches=1)
        result = train_step(wrapped, optimizer, batches, loss, step=number, groups=groups)
        text, visual = result.totals[0], result.totals[4 : 4 + model.num_depths].mean()
        return [
            float(text / agreement.text_count),
            float(visual / agreement.visual_count),
            result.grad_norm,
        ]

    def static() -> float:
        books = list(model.visual_head.codebooks.tables())
        held = [*model.parameters(), *books]
        held += [p.main_grad for p in model.parameters() if p.requires_grad]
        return tensor_bytes(held) + state_bytes(optimizer)

    return step, static


def watch_parts(model: AsvrModel, watch: Any) -> None:
    """Measure the parts of the forward pass, and when the backward pass leaves the heads."""

    def around(owner: Any, method: str, name: str, *, splits: bool = False) -> None:
        plain_method = getattr(owner, method)

        def timed(hidden: Any, *rest: Any, **named: Any) -> Any:
            if splits and name.startswith("LM") and hidden.requires_grad:
                hidden.register_hook(lambda _: watch.lap("heads, backward"))
            with watch.part(name):
                return plain_method(hidden, *rest, **named)

        object.__setattr__(owner, method, timed)

    around(model, "encode_images", "encoder")
    around(model.language_model, "forward", "language model, forward")
    around(model, "_text", "LM head and loss, forward", splits=True)
    around(model, "_visual", "visual head and loss, forward")
    reduce = train_steps.reduce_gradients

    def reduced(*given: Any, **named: Any) -> None:
        watch.lap("rest, backward")
        reduce(*given, **named)

    train_steps.reduce_gradients = reduced


def micro_batch(
    load: Workload, batch: list[Sample], codes_PD: Tensor, *, length: int = 0
) -> MicroBatch:
    """The samples as the data pipeline arranges them, in rows of at least ``length`` places."""
    patches = load.model.vision.num_patches
    lengths = [len(s.tokens) + patches * (s.pixels_CHW is not None) for s in batch]
    shape = (len(batch), max(length, *lengths))
    tokens = torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, IGNORE)
    document = torch.full(shape, -1, dtype=torch.int32)
    places = []
    for row, (sample, length) in enumerate(zip(batch, lengths, strict=True)):
        image = patches * (sample.pixels_CHW is not None)
        for ids, target, fill in ((sample.tokens, tokens, 0), (sample.labels, targets, IGNORE)):
            whole = torch.cat([ids[:BEFORE], torch.full((image,), fill), ids[BEFORE:]])
            if target is targets:
                whole = torch.cat([whole[1:], torch.tensor([IGNORE])])
            target[row, :length] = whole
        document[row, :length] = row
        start = row * shape[1] + BEFORE
        places += range(start, start + image)
    positions = torch.tensor(places, dtype=torch.int64)
    pixels = [sample.pixels_CHW for sample in batch if sample.pixels_CHW is not None]
    return MicroBatch(
        tokens_BS=tokens,
        text_targets_BS=targets,
        position_ids_BS=torch.arange(shape[1]).repeat(len(batch), 1),
        document_BS=document,
        branch_BS=torch.zeros(shape, dtype=torch.int32),
        index_BS=torch.arange(shape[1]).repeat(len(batch), 1),
        image_positions_P=positions,
        image_patches_P=torch.arange(len(positions)),
        pixel_values_ICHW=torch.stack(pixels) if pixels else None,
        image_share=(0, len(pixels)),
        num_images=len(pixels),
        visual_positions_M=positions,
        visual_patches_M=torch.arange(len(positions)),
        codes_PD=codes_PD,
        sample_ids=[str(row) for row in range(len(batch))],
    )


def packed(batch: MicroBatch) -> MicroBatch:
    """The same documents in one row without padding, as ``data.packing`` arranges them."""
    is_real_BS = batch.document_BS >= 0
    places = is_real_BS.flatten().cumsum(0) - 1
    rows = ("tokens_BS", "text_targets_BS", "position_ids_BS", "document_BS", "branch_BS")
    flat = ("image_positions_P", "visual_positions_M")
    return dataclasses.replace(
        batch,
        **{name: getattr(batch, name)[is_real_BS][None] for name in rows},
        **{name: places[getattr(batch, name)] for name in flat},
        index_BS=torch.arange(int(is_real_BS.sum()))[None],
    )
