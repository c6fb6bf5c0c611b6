"""A small whole model and hand-made micro-batches, for the tests of the model."""

import dataclasses

import torch
from torch import Tensor

from megatron_asvr.batch import IGNORE, MicroBatch, image_share
from megatron_asvr.config.schema import (
    Config,
    DataConfig,
    LanguageConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
    VisionConfig,
    VisualHeadConfig,
)
from megatron_asvr.model import sharding
from megatron_asvr.model.asvr import AsvrModel
from megatron_asvr.model.tokenizer import TokenizerConfig, VisualTokenizer
from megatron_asvr.parallel.groups import Groups

NUM_PATCHES = 4
LENGTH = 16
SIZES = (7, 5, 6)  # codewords of each depth: two ranks need padding
IMAGE_ID = 3

CONFIG = Config(
    model=ModelConfig(
        language=LanguageConfig(
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            ffn_hidden_size=48,
            vocab_size=101,
            init_std=0.2,
        ),
        vision=VisionConfig(
            hidden_size=24,
            num_layers=3,
            num_heads=2,
            ffn_hidden_size=40,
            image_size=16,
            patch_size=8,
            init_std=0.2,
        ),
        visual_head=VisualHeadConfig(width=16, num_layers=2, num_heads=2, init_std=0.2),
    ),
    loss=LossConfig(visual_weight=0.5),
    data=DataConfig(codes="online"),
    train=TrainConfig(
        precision="fp32",
        trainable=("vision_encoder", "projector", "language_model", "visual_head"),
    ),
)


def config(**train) -> Config:
    """``CONFIG`` with other settings of ``train``."""
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **train))


def tokenizer() -> VisualTokenizer:
    """A tokenizer with random weights and codebooks."""
    generator = torch.Generator().manual_seed(2)
    made = VisualTokenizer(
        TokenizerConfig(
            kind="semantic", vision=CONFIG.model.vision, feature_layer=-2, codebook_sizes=SIZES
        )
    )
    with torch.no_grad():
        for parameter in made.encoder.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    made.set_codebooks([torch.randn(size, 24, generator=generator) for size in SIZES])
    return made


def build(config: Config, groups: Groups, **stage) -> AsvrModel:
    """The model with every weight, norm and bias drawn from a seed."""
    model = AsvrModel(config, groups=groups, tokenizer=tokenizer(), **stage)
    sharding.seeded_init(model, 5, groups=groups, std=model.init_std)
    names = sharding.canonical_names(model)
    with torch.no_grad():
        drawn = {}
        for local, parameter in model.named_parameters():
            shape = sharding.full_shape(parameter, groups=groups)
            if local.endswith("bias") or len(shape) == 1:
                generator = torch.Generator().manual_seed(sum(names[local].encode()))
                base = 0.0 if local.endswith("bias") else 1.0
                drawn[names[local]] = base + 0.2 * torch.randn(shape, generator=generator)
    sharding.load_weights(model, drawn.get, groups=groups, strict=False)
    return model


def micro_batch(kind: str, groups: Groups | None = None) -> MicroBatch:
    """Two samples; the batch of this rank, or with the pixels of all images without groups.

    Kinds: ``images`` (one image with two questions; a text part, then an image with a caption;
    three images in all, so two ranks have unequal shares), ``no_images``, ``no_text`` (images
    without any text target), ``one_image`` (the second rank encodes none).
    """
    generator = torch.Generator().manual_seed(len(kind))
    tokens = torch.randint(4, 101, (2, LENGTH), generator=generator)
    targets = tokens.roll(-1, 1)
    targets[:, LENGTH - 3 :] = IGNORE
    document = torch.zeros(2, LENGTH, dtype=torch.int32)
    document[:, LENGTH - 2 :] = -1
    branch = torch.zeros_like(document)
    position = torch.arange(LENGTH).repeat(2, 1)
    starts = {
        "images": [1, LENGTH + 2, LENGTH + 7],
        "no_text": [1, LENGTH + 2, LENGTH + 7],
        "one_image": [1],
        "no_images": [],
    }[kind]
    if kind == "images":  # sample 0: image at 1..4, question A at 5..8, question B at 9..13
        branch[0, 5:9], branch[0, 9:14] = 1, 2
        position[0, 9:14] = torch.arange(5, 10)
        targets[0, 8] = IGNORE
    if kind == "no_text":
        targets[:] = IGNORE
    places = torch.tensor([s + p for s in starts for p in range(NUM_PATCHES)], dtype=torch.int64)
    tokens.view(-1)[places] = IMAGE_ID
    targets.view(-1)[places - 1] = IGNORE
    count = len(starts)
    pixels = torch.randn(count, 3, 16, 16, generator=generator) if count else None
    batch = MicroBatch(
        tokens_BS=tokens,
        position_ids_BS=position,
        text_targets_BS=targets,
        document_BS=document,
        branch_BS=branch,
        index_BS=torch.arange(LENGTH).repeat(2, 1),
        image_positions_P=places,
        image_patches_P=torch.arange(len(places)),
        pixel_values_ICHW=pixels,
        image_share=(0, count),
        num_images=count,
        visual_positions_M=places,
        visual_patches_M=torch.arange(len(places)),
        codes_PD=None,
        sample_ids=["a", "b"],
    )
    return batch if groups is None else share_of(batch, groups.tp_rank, groups.plan.tp)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradient of every trained parameter, each of which must have one."""
    found = {name: x.grad for name, x in model.named_parameters() if x.requires_grad}
    assert all(grad is not None for grad in found.values())
    return found


def share_of(batch: MicroBatch, rank: int, ways: int) -> MicroBatch:
    """The batch with only the images that ``rank`` of ``ways`` encodes.

    Args:
        batch: a batch that holds the pixels of all its images.
        rank: place in the tensor-parallel group.
        ways: size of the group.
    """
    start, end = image_share(batch.num_images, rank, ways)
    pixels_ICHW = batch.pixel_values_ICHW
    if pixels_ICHW is not None:
        pixels_ICHW = pixels_ICHW[start:end]
    return dataclasses.replace(batch, pixel_values_ICHW=pixels_ICHW, image_share=(start, end))
