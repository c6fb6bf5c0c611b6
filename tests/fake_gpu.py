"""A forward pass of every stage of a recipe, at its real size, on a GPU that is not there.

    python -m tests.fake_gpu RECIPE WORLD

torch without CUDA aborts on fake CUDA tensors, so the GPU is torch's private device, for which
nothing is implemented: what is not fake fails, and so does an operation that mixes devices. It is
registered once for the whole process, hence a process of its own.
"""

import sys

from megatron_asvr.platforms import mcore, redirects, without_memory  # noqa: F401

import torch
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from megatron_asvr.config.check import check
from megatron_asvr.config.load import load
from megatron_asvr.config.schema import Config
from megatron_asvr.model.asvr import AsvrModel
from megatron_asvr.model.tokenizer import TokenizerConfig, VisualTokenizer
from megatron_asvr.parallel.groups import Groups, imagined
from megatron_asvr.parallel.plan import make_plan
from megatron_asvr.planner.rehearsal import Count, largest, micro_batch, to_fake

CODES = (16384,) * 8


def use_gpu() -> torch.device:
    """The device that stands for a GPU; what megatron-core asks of CUDA goes there."""
    _setup_privateuseone_for_python_backend("gpu")
    device = torch.device("gpu", 0)
    redirects._is_cuda = lambda wanted: False
    torch.cuda.current_device = lambda: device
    torch.Tensor.cuda = lambda x, *args, **kwargs: x.to(device)
    return device


def forward(run: Config, groups: Groups, device: torch.device, *, astray: str | None) -> None:
    """One forward pass of a stage.

    Args:
        run: the run.
        groups: of a rank of the stage.
        device: of parameters and micro-batch.
        astray: field of the micro-batch that stays on the CPU.
    """
    codes = TokenizerConfig(
        kind="semantic", vision=run.model.vision, feature_layer=-2, codebook_sizes=CODES
    )
    with without_memory():
        model = AsvrModel(run, groups=groups, tokenizer=VisualTokenizer(codes))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        to_fake(model, "te", device)
        batch = micro_batch(model, largest(run), device)
        if astray is not None:
            setattr(batch, astray, torch.empty_like(getattr(batch, astray), device="cpu"))
        with Count(model):
            model(batch)


def main(recipe: str, world: int) -> None:
    """Every stage once, and once with positions that were left on the CPU."""
    device, run = use_gpu(), check(load(recipe), world)
    plan = make_plan(run, world, CODES)
    for stage in range(plan.pp):
        with imagined(plan, stage * (world // plan.pp)) as groups:
            forward(run, groups, device, astray=None)
            try:
                forward(run, groups, device, astray="position_ids_BS")
            except FakeTensorDeviceMismatchError:
                sys.stdout.write(f"stage {stage} of {plan.pp}: all on {device}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
