"""A trained model that answers questions: what `eval`, `chat` and `verify` share.

The model is rebuilt from its run in whatever layout this process belongs to; the visual head and
the codes are not needed for answers and not built.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial

from megatron_asvr.platforms import select

import torch
from torch import Tensor

from megatron_asvr.checkpoint.reader import read_run
from megatron_asvr.config.check import check
from megatron_asvr.config.load import override
from megatron_asvr.config.schema import Config, ParallelConfig, PrecisionConfig
from megatron_asvr.data.conversation import Turn, prompt_ids
from megatron_asvr.data.pixels import BLANK_KEY, PixelStore
from megatron_asvr.data.sample import SampleBuilder
from megatron_asvr.data.templates import find_template
from megatron_asvr.data.text import IMAGE_TOKEN, TextTokenizer
from megatron_asvr.data.views import NEWLINE, ImageLayout, Size
from megatron_asvr.errors import DataError
from megatron_asvr.model.asvr import build_model
from megatron_asvr.model.sharding import load_shared
from megatron_asvr.parallel.collectives import on_first
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.stored import run_checks
from megatron_asvr.train.generate import Generator, Prompt


def inference_config(run: str, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a run for answering: all frozen, no visual head.

    Args:
        run: run folder or checkpoint.
        overrides: ``a.b=c`` settings that win, e.g. another layout.

    Raises:
        CheckpointError: there is no complete checkpoint.
        ConfigError: an override is wrong, or cannot work.
    """
    config = _plain(read_run(run)[0])
    config = _plain(check(override(config, overrides)))
    return dataclasses.replace(
        config,
        loss=dataclasses.replace(config.loss, mode="exact", visual_weight=0.0),
        train=dataclasses.replace(config.train, trainable=()),
    )


def _plain(config: Config) -> Config:
    """The same without stages, parts of sequences or shared experts, and without 8 bits.

    Answers are short; and the scales of a run belong to its training.
    """
    return dataclasses.replace(
        config,
        parallel=ParallelConfig(tp=config.parallel.tp),
        precision=PrecisionConfig(backend=config.precision.backend),
    )


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


class Answerer:
    """A run's model, its tokenizer and its way of seeing images.

    Args:
        run: run folder or checkpoint.
        config: from ``inference_config``.
        groups: process groups of this rank.
        max_new_tokens: longest answer.
        rounded_to: round every weight to this type first, as an export in that type does.

    Raises:
        CheckpointError: the run does not hold every weight.
    """

    def __init__(
        self,
        run: str,
        config: Config,
        *,
        groups: Groups,
        max_new_tokens: int = 32,
        rounded_to: torch.dtype | None = None,
    ) -> None:
        self.config = config
        self.text = TextTokenizer(str(config.model.text_tokenizer))
        self.template = find_template(config.data.template, self.text)
        self._builder = SampleBuilder(config, self.text, branches=False)
        self._pixels = PixelStore(config, device=select()[0].device)
        self._sizes: dict[str, Size] = {}  # of images of prompts, by path
        model = build_model(config, groups=groups, tokenizer=None)
        exact = rounded_to is not None  # an export starts from the optimizer's weights
        _, weights = on_first(partial(read_run, run, masters=exact), group=groups.world)
        run_checks(weights.checks, group=groups.world)
        convert = None if rounded_to is None else partial(_rounded, dtype=rounded_to)
        load_shared(model, weights.stored, groups=groups, convert=convert)
        model.leave_out_unused()
        self._generator = Generator(
            model.eval(),
            self.pixels,
            groups=groups,
            eos_id=self.template.end_id,
            max_new_tokens=max_new_tokens,
        )

    def prompt(self, turns: Sequence[Turn], images: Sequence[str]) -> Prompt:
        """The conversation so far as a prompt.

        Args:
            turns: the last one is the user's; their ``<image>`` placeholders stand for ``images``.
            images: paths.

        Raises:
            DataError: the placeholders and the images differ in number.
        """
        words = prompt_ids(turns, self.template, self.text)
        count = words.count(self.text.image_id)
        if count != len(images):
            raise DataError(
                f"{len(images)} images for {count} {IMAGE_TOKEN} placeholders in "
                f"{turns[-1].text!r}; give one image for each"
            )
        layouts = self.layouts(images)
        ids, starts = self._builder.expand(words, layouts)
        positions: list[int] = []
        patches: list[int] = []
        newlines: list[int] = []
        views: list[str] = []
        for path, start, layout in zip(images, starts, layouts, strict=True):
            first = len(views) * self.config.model.vision.num_patches
            for position, patch in enumerate(layout.patches_L.tolist(), start):
                if patch == NEWLINE:
                    newlines.append(position)
                else:
                    positions.append(position)
                    patches.append(first + patch)
            views += layout.keys(path)
        return Prompt(
            token_ids=tuple(ids),
            image_positions=tuple(positions),
            image_patches=tuple(patches),
            newline_positions=tuple(newlines),
            images=tuple(views),
        )

    def layouts(self, images: Sequence[str]) -> list[ImageLayout]:
        """How the images with these paths stand in a prompt.

        Raises:
            DataError: a file cannot be read, or the gate refuses it.
        """
        for path in images:
            if path not in self._sizes:
                sized = self._builder.layouts.needs_sizes
                self._sizes[path] = self._pixels.size(path) if sized else (1, 1)
        return [self._builder.layouts.of(self._sizes[path]) for path in images]

    def answers(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """New token ids of every prompt, in order, without the end token."""
        found = dict(self._generator.answers(prompts))
        return [found[i] for i in range(len(prompts))]

    def logits(self, prompt: Prompt) -> Tensor:
        """Logits [S, T] at every position of a prompt."""
        return self._generator.logits(prompt)

    def pixels(self, views: Sequence[str]) -> Tensor:
        """float32 pixels [I, C, H, W] of views of prompts' images, as in training."""
        if self.config.data.blank_images:
            return self._pixels.normalised([BLANK_KEY] * len(views), {})
        return self._pixels.normalised(views, {path: path for path in self._sizes})
