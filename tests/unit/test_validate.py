"""Evaluation runs the chunks that are trained, forward only, and leaves them as they were."""

import pytest
import torch

from megatron_asvr.model.asvr import AsvrModel
from megatron_asvr.train.validate import validate
from tests.language_cases import one_rank
from tests.run_cases import Bench, config, step_batches


class Split:
    """The micro-batches of a step, twice, as a loader gives them."""

    steps = 2

    def __init__(self, bench: Bench) -> None:
        self.batches = step_batches(bench.run, 0, bench.groups)

    def step(self, step: int):
        return self.batches


@pytest.fixture
def bench():
    with one_rank() as groups:
        made = Bench(config(), groups)
        made.step(5)  # gradients and optimizer state are those of another batch
        yield made


def test_the_trained_chunks_are_evaluated_without_a_graph(bench, monkeypatch):
    def build(*_, **__):
        raise AssertionError("a model is built")

    monkeypatch.setattr(AsvrModel, "__init__", build)
    (chunk,), seen = bench.chunks, []
    chunk.register_forward_hook(
        lambda module, _, sums: seen.append(
            (torch.is_grad_enabled(), module.training, sums.visual_sum_D.requires_grad)
        )
    )
    weights = {name: x.clone() for name, x in chunk.state_dict().items() if torch.is_tensor(x)}
    grads = [p.main_grad.clone() for p in chunk.parameters() if p.requires_grad]
    split = Split(bench)
    values = validate(bench.chunks, split, bench.run.loss, groups=bench.groups)
    assert seen == [(False, False, False)] * 2 * len(split.batches)
    assert chunk.training
    assert all(torch.equal(x, chunk.state_dict()[name]) for name, x in weights.items())
    after = [p.main_grad for p in chunk.parameters() if p.requires_grad]
    assert all(map(torch.equal, after, grads))
    assert all(p.grad is None for p in chunk.parameters())
    # The step that trains on the same batches has the same loss before its update.
    assert bench.step(0).loss == pytest.approx(values["loss"], rel=1e-6)
