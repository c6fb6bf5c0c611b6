"""The planner's arithmetic against the tensors that autograd keeps."""

from collections.abc import Callable

import pytest
import torch

from megatron_asvr.model.asvr import build_model
from megatron_asvr.planner.activations import Activations, Shape
from tests.language_cases import one_rank
from tests.run_cases import CODEBOOK_SIZES, LENGTH, config, micro_batch, tokenizer

INDICES = (torch.int32, torch.int64)
PARTS = ("projector", "visual_head", "language_model")


def kept_bytes(run) -> int:
    """Bytes of all different tensors, but indices and parameters, that a forward pass keeps."""
    visual = tokenizer(run.model.vision)
    with one_rank() as groups:
        model = build_model(run, groups=groups, tokenizer=visual)
        known = {x.untyped_storage().data_ptr() for x in [*model.parameters(), *model.buffers()]}
        batch = micro_batch(run, 1, images=(1, 1))
        known.add(batch.pixel_values_ICHW.untyped_storage().data_ptr())
        kept = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            place = x.untyped_storage().data_ptr()
            if x.dtype not in INDICES and place not in known:
                kept[place] = x  # alive, so that no other tensor gets its place
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, identity):
            sums = model(batch)
        assert sums.text_count == 10
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


def planned(run) -> dict[str, int]:
    shape = Shape(rows=2, length=LENGTH, images=2, texts=10, codes=8)
    width = run.model.vision.hidden_size
    a = Activations(
        config=run, shape=shape, codebook_sizes=CODEBOOK_SIZES, code_width=width, backend="local"
    )
    return {
        "encoder": a.encoder()[0],
        "projector": a.projector(),
        "layers": run.model.language.num_layers * a.layer() + a.shared(),
        "text_loss": a.text_loss(),
        "visual_head": a.visual_head(),
    }


CASES: dict[str, Callable] = {
    "fp32": lambda: config(),
    "bf16": lambda: config(train__precision="bf16"),
    "selective": lambda: config(train__recompute="selective"),
    "full": lambda: config(train__recompute="full"),
    "head": lambda: config(train__recompute_visual_head=True),
    "stage1": lambda: config(train__trainable=["projector", "visual_head"]),
    "selective_stage1": lambda: config(
        train__trainable=["projector", "visual_head"], train__recompute="selective"
    ),
    "encoder": lambda: config(train__trainable=[*PARTS, "vision_encoder"]),
    "qwen2": lambda: config(model__language__family="qwen2"),
    "qwen3": lambda: config(model__language__family="qwen3", model__language__head_dim=12),
    "qwen3_bf16": lambda: config(model__language__family="qwen3", train__precision="bf16"),
    "deep_head": lambda: config(model__visual_head__num_layers=3),
}


@pytest.mark.parametrize("name", CASES)
def test_planned_bytes_are_those_that_autograd_keeps(name):
    run = CASES[name]()
    assert sum(planned(run).values()) == kept_bytes(run), planned(run)
