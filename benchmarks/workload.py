"""What both sides of `benchmarks.step` train: sizes, samples, and the arithmetic they need."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_asvr.batch import IGNORE
from megatron_asvr.config.schema import (
    Config,
    LanguageConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    VisionConfig,
    VisualHeadConfig,
)
from megatron_asvr.parallel.costs import Counts, rates

BEFORE = 8  # tokens in front of an image
LR = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Sizes of a model and of its batches.

    Attributes:
        model: sizes of the model.
        codebook_sizes: codewords of each depth.
        batch: samples of a step.
        text: fewest and most text tokens of a sample.
    """

    model: ModelConfig
    codebook_sizes: tuple[int, ...]
    batch: int
    text: tuple[int, int]

    def config(self, precision: str) -> Config:
        """The run's configuration, with the batch of a step as its micro-batch."""
        return Config(
            model=self.model,
            train=TrainConfig(
                precision=precision,
                global_batch=self.batch,
                micro_batch=self.batch,
                optim=OptimConfig(lr=LR),
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One sample: text, and an image after its first tokens.

    Attributes:
        tokens: int64, text alone.
        labels: int64, the tokens that are predicted, IGNORE elsewhere.
        pixels_CHW: the image, or None.
    """

    tokens: Tensor
    labels: Tensor
    pixels_CHW: Tensor | None


MID = Workload(
    model=ModelConfig(
        language=LanguageConfig(
            hidden_size=512, num_layers=8, num_heads=8, ffn_hidden_size=1376, vocab_size=32000
        ),
        vision=VisionConfig(
            hidden_size=256,
            num_layers=12,
            num_heads=4,
            ffn_hidden_size=1024,
            image_size=256,
            patch_size=16,
        ),
        visual_head=VisualHeadConfig(width=512, num_heads=4),
    ),
    codebook_sizes=(16384,) * 8,
    batch=4,
    text=(20, 256),
)
SHORT = Workload(
    model=ModelConfig(
        language=LanguageConfig(
            hidden_size=64, num_layers=2, num_heads=4, ffn_hidden_size=160, vocab_size=2000
        ),
        vision=VisionConfig(
            hidden_size=32,
            num_layers=3,
            num_heads=2,
            ffn_hidden_size=64,
            image_size=64,
            patch_size=16,
        ),
        visual_head=VisualHeadConfig(width=64, num_heads=2),
    ),
    codebook_sizes=(512,) * 4,
    batch=4,
    text=(20, 64),
)
WORKLOADS = {"mid": MID, "short": SHORT}


def samples(load: Workload, step: int) -> list[Sample]:
    """The samples of a step; the last one of every second step is text alone.

    Args:
        load: sizes.
        step: counted from 0.
    """
    generator = torch.Generator().manual_seed(step)
    side, vocab = load.model.vision.image_size, load.model.language.vocab_size
    made = []
    for place in range(load.batch):
        length = int(torch.randint(load.text[0], load.text[1] + 1, (), generator=generator))
        tokens = torch.randint(3, vocab, (length,), generator=generator)
        labels = tokens.clone()
        labels[: BEFORE + (length - BEFORE) // 2] = IGNORE  # the question
        blank = step % 2 == 1 and place == load.batch - 1
        pixels = None if blank else torch.randn(3, side, side, generator=generator)
        made.append(Sample(tokens=tokens, labels=labels, pixels_CHW=pixels))
    return made


def useful_flops(load: Workload, batch: list[Sample]) -> dict[str, float]:
    """Floating point operations of forward and backward pass that no implementation can save.

    The cost model of a run's log (megatron_asvr/parallel/costs.py), from the samples themselves.

    Args:
        load: sizes.
        batch: samples of one step.
    """
    patches = load.model.vision.num_patches
    images = sum(sample.pixels_CHW is not None for sample in batch)
    lengths = [len(s.tokens) + patches * (s.pixels_CHW is not None) for s in batch]
    counts = Counts(
        images=images,
        patches=images * patches,
        positions=sum(lengths),
        pairs=sum(n * (n + 1) / 2 for n in lengths),
        labels=sum(int((s.labels != IGNORE).sum()) for s in batch),
        codes=images * patches,
    )
    return rates(load.config("fp32"), load.codebook_sizes, useful=True).parts(counts)
