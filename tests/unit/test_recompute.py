"""Computing activations again in the backward pass changes memory, not one bit of a gradient."""

from collections import Counter

import pytest
import torch

from tests.asvr_cases import build, config, gradients, micro_batch
from tests.language_cases import one_rank
from tests.unit.test_asvr import loss_of


@pytest.fixture(scope="module")
def groups():
    with one_rank() as made:
        yield made


def run(groups, **train):
    """Gradients, and how often each watched module ran."""
    model, runs = build(config(**train), groups), Counter()
    layers = model.language_model.decoder.layers
    watched = {
        "layer": layers[1].mlp,
        "attention": layers[1].self_attention.core_attention,
        "visual head": model.visual_head.layers[0].mlp,
    }
    for name, module in watched.items():
        module.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    loss_of(model(micro_batch("images"))).backward()
    return gradients(model), runs


@pytest.mark.parametrize(
    ("train", "again"),
    [
        ({"recompute": "full"}, {"layer", "attention"}),
        ({"recompute": "selective"}, {"attention"}),
        ({"recompute_visual_head": True}, {"visual head"}),
    ],
)
def test_only_what_was_asked_for_is_computed_again(train, again, groups):
    expected, once = run(groups)
    assert set(once.values()) == {1}
    got, runs = run(groups, **train)
    assert {name for name, number in runs.items() if number == 2} == again
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())
