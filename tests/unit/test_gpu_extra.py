"""The check of the GPU stack's resolution notices what can go wrong with one."""

from megatron_asvr.platforms import stack

import pytest

from tools.gpu_extra import COMPILED, faults, wanted


def resolution(**changes):
    versions = {name: v for name, v in stack.pins().items() if name != COMPILED} | changes
    wants = [f"transformer_engine_torch=={stack.pins()[COMPILED]}; extra == 'pytorch'"]
    return [
        {"metadata": {"name": name.replace("-", "_"), "version": v, "requires_dist": wants}}
        for name, v in versions.items()
    ]


def test_the_pinned_versions_are_right():
    assert faults(resolution(), stack.pins()) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"torch": "2.14.0"}, "torch: pinned 2.13.0, resolved 2.14.0"),
        ({"nvidia-cublas-cu12": "12.9"}, "packages of 2 CUDA versions: 12, 13"),
    ],
)
def test_another_version_or_cuda_is_noticed(change, text):
    assert faults(resolution(**change), stack.pins()) == [text]


def test_a_pin_that_nothing_needs_or_that_transformer_engine_does_not_want_is_noticed():
    pins = {**stack.pins(), "flash-attn": "2.0", COMPILED: "2.19.0"}
    unneeded, unwanted = faults(resolution(), pins)
    assert unneeded == "flash-attn==2.0 is pinned, but nothing wants it any more"
    assert unwanted.startswith(f"{COMPILED}: pinned 2.19.0, Transformer Engine wants")


def test_what_is_asked_for_is_what_setup_declares():
    texts = wanted()
    assert f"transformer-engine[core-cu13]=={stack.pins()['transformer-engine']}" in texts
    assert "nvidia-dali-cuda130==2.4.0" in texts
