"""Bytes that one micro-batch needs, counted while the model's own code runs on fake tensors.

A fake tensor has shape, type and device, and no memory; operations on it give fake tensors. So the
forward and backward passes of a stage of any size take seconds on one CPU, nothing is computed, and
every tensor that they would make, autograd would keep, and their end would free is counted by its
storage. What a kernel uses inside itself is not seen.

Rows count as one document each. A GPU is imagined by changes: a norm keeps its input and an inverse
root for each position, a linear its input; Transformer Engine's layers rotate and gate by
megatron-core's code, and their attention never takes a mask. Not measured on a GPU.
"""

import contextlib
import functools
import gc
import weakref
from dataclasses import dataclass
from typing import Any, Literal

from megatron_asvr.platforms import kernels, mcore  # noqa: F401  (mcore prepares the process)

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_asvr.batch import MicroBatch, image_share
from megatron_asvr.config.schema import Config
from megatron_asvr.model.asvr import AsvrModel
from megatron_asvr.model.loss import LossSums, Scales
from megatron_asvr.precision import norm
from megatron_asvr.precision.local import GatedMLP, LocalSelfAttention, dense_rule
from megatron_asvr.precision.remake import kept_whole

_CPU = torch.device("cpu")
Layers = Literal["te", "local", "cpu"]  # Transformer Engine's, torch's on a GPU, torch's on the CPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The largest micro-batch, as one rank sees it.

    Attributes:
        rows: sequences.
        length: columns of a row on all context-parallel ranks together.
        images: views on all ranks.
        texts: positions of this rank with a text target.
        codes: positions of this rank with a visual target.
    """

    rows: int
    length: int
    images: int
    texts: int
    codes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Bytes of one micro-batch on one model chunk.

    Attributes:
        kept: from the end of the forward pass to the backward pass.
        forward: beside these, at the peak of the forward pass (logits are there).
        backward: beside these, at the peak of the backward pass.
    """

    kept: int
    forward: int
    backward: int


def largest(config: Config) -> Shape:
    """The largest micro-batch that a run can have, when a sample shows one picture.

    Without packing every row is as long as ``data.max_length`` allows; a packed row counts as full
    of pictures, and of text targets too.

    Args:
        config: the run, checked.
    """
    d, cp, rows = config.data, config.parallel.cp, config.train.micro_batch
    patches, views = config.model.vision.num_patches, config.model.resolution.most_views
    length = (d.pack_length or d.max_length) if d.packing else d.max_length
    multiple = (2 * cp if cp > 1 else 1) * (config.parallel.tp if config.parallel.sp else 1)
    length = -(-length // multiple) * multiple
    pictures = rows * (max(1, length // (views * patches)) if d.packing else 1)
    images = pictures * views
    shown = min(images * patches, rows * length)
    codes = min(shown, int(config.loss.visual_positions * shown) + images)  # data/subsample.py
    texts = rows * length if d.packing else rows * length - shown
    return Shape(rows=rows, length=length, images=images, texts=texts // cp, codes=codes // cp)


def rehearse(model: AsvrModel, shape: Shape, layers: Layers) -> Passes:
    """What a forward and a backward pass of one micro-batch need.

    Args:
        model: a chunk without memory (``platforms.without_memory``).
        shape: of the micro-batch.
        layers: whose memory is counted.
    """
    are_used = layers == "cpu" and model.run_config.precision.kernels
    with FakeTensorMode(allow_non_fake_inputs=True), kernels.imagined(are_used):
        to_fake(model, layers)
        with Count(model) as count, contextlib.nullcontext() if layers == "cpu" else kept_whole():
            batch = micro_batch(model, shape)
            output = _outputs(model(batch, scales=Scales(1.0, [1.0] * model.num_depths)))
            held, forward = count.now, count.restart()
            torch.autograd.backward(output, [torch.ones_like(x) for x in output])
            backward = count.restart()
            del output, batch
            model.set_input_tensor(None)
            gc.collect()
    kept = held - count.now
    return Passes(kept=kept, forward=forward - kept, backward=backward - kept)


def to_fake(model: AsvrModel, layers: Layers, device: torch.device = _CPU) -> None:
    """Make fake tensors of a chunk's parameters, as a rank holds them when training begins.

    There are gradient buffers like those of megatron-core's DistributedDataParallel, and the parts
    of a GPU's layers that keep less. For use inside a ``FakeTensorMode``.

    Args:
        model: a chunk without memory; it is changed.
        layers: whose memory is counted.
        device: of the fake tensors; an operation that mixes devices raises.
    """
    for module in (model, model.images.tokenizer):
        if module is not None:
            module.to_empty(device=device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.main_grad = torch.empty_like(parameter, dtype=torch.float32)
            parameter.register_post_accumulate_grad_hook(_store)
    if model.language_model is not None:
        model.language_model.mask = functools.partial(_mask, model, layers)
    for module in model.modules():
        if layers != "cpu" and isinstance(module, norm.RMSNorm):
            module.forward = functools.partial(_one_node, module)
        if layers == "te" and isinstance(module, (LocalSelfAttention, GatedMLP)):
            module.forward = functools.partial(type(module).__base__.forward, module)


def _mask(model: AsvrModel, layers: Layers, batch: MicroBatch) -> Tensor | None:
    """None, which is causal, unless torch's layers need a mask for documents of whole rows."""
    window, length = model.run_config.model.language.sliding_window, batch.document_BS.shape[1]
    fits = batch.context[1] == 1 and (window is None or window >= length)
    return None if layers == "te" or fits else dense_rule(batch, sliding_window=window)


def _store(parameter: Tensor) -> None:
    if parameter.grad is not None:  # else it was added where it was computed
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None


def _one_node(module: norm.RMSNorm, x: Tensor) -> Tensor:
    return norm.one_node(x, module.weight, module.eps)


def _outputs(found: Any) -> list[Tensor]:
    """What a backward pass starts from, of what a chunk gives."""
    output = []
    for part in found if isinstance(found, tuple) else (found,):
        is_sums = isinstance(part, LossSums)
        output += [part.text_sum, part.visual_sum_D] if is_sums else [part]
    return [x for x in output if x.requires_grad]


def micro_batch(model: AsvrModel, shape: Shape, device: torch.device = _CPU) -> MicroBatch:
    """A micro-batch without contents; a later stage has received its hidden states.

    Args:
        model: of ``to_fake``.
        shape: of the micro-batch.
        device: of its tensors.
    """
    groups, model_config = model.groups, model.run_config.model
    plan, rows, columns = groups.plan, shape.rows, shape.length
    vision, patches = model_config.vision, shape.images * model_config.vision.num_patches
    share = image_share(shape.images, groups.tp_cp.rank(), groups.tp_cp.size())
    crops = (share[1] - share[0]) * model_config.resolution.num_crops
    codes = model.images.tokenizer is None

    def empty(*sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device)

    def pixels() -> Tensor:
        return empty(crops, 3, vision.image_size, vision.image_size, dtype=torch.float32)

    if not model.pre_process:
        own = columns // plan.cp // (plan.tp if plan.sp else 1)
        hidden = empty(
            own, rows, model_config.language.hidden_size, dtype=model.config.params_dtype
        )
        model.set_input_tensor(hidden.requires_grad_())
    batch = MicroBatch(
        tokens_BS=empty(rows, columns // plan.cp),
        text_targets_BS=None,
        position_ids_BS=empty(rows, columns),
        document_BS=empty(rows, columns, dtype=torch.int32),
        branch_BS=empty(rows, columns, dtype=torch.int32),
        index_BS=empty(rows, columns),
        image_positions_P=empty(patches // plan.cp),
        image_patches_P=empty(patches // plan.cp),
        pixel_values_ICHW=pixels() if model.pre_process or not codes else None,
        image_share=share,
        num_images=shape.images,
        visual_positions_M=empty(shape.codes),
        visual_patches_M=empty(shape.codes),
        codes_PD=empty(patches, model.num_depths) if codes else None,
        newline_positions=empty(0) if model_config.resolution.newline else None,
        sample_ids=[],
        context=(groups.cp_rank, plan.cp),
    )
    # Without contents, targets cannot be looked for.
    batch.text_targets_BS = empty(rows, columns // plan.cp)
    batch.text_positions_X = empty(shape.texts)
    return batch


class Count(TorchDispatchMode):
    """Bytes of storages that operations inside made and that still exist.

    Args:
        model: what exists before.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: dict[int, weakref.ref] = {}
        before = [*model.parameters(), *model.buffers()]
        for x in [*before, *(p.main_grad for p in before if hasattr(p, "main_grad"))]:
            self._add(x, 0)

    def restart(self) -> int:
        """The most bytes since the last restart."""
        most, self.most = self.most, self.now
        return most

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # asked more often than all else together
        try:
            found = func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            return True  # the code asks whether two things agree
        for x in tree_iter(found):
            if isinstance(x, Tensor):
                self._add(x, x.untyped_storage().nbytes())
        return found

    def _add(self, x: Tensor, size: int) -> None:
        storage = x.untyped_storage()
        place = id(storage)
        if place in self._known:
            return

        def freed(_: weakref.ref) -> None:
            del self._known[place]
            self.now -= size

        self._known[place] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)
