"""The vision encoder against transformers, and its behaviour at the edges."""

import dataclasses

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from megatron_asvr.config.schema import VisionConfig
from megatron_asvr.errors import AsvrError
from megatron_asvr.model.vision import SiglipEncoder

# 58 pixels do not divide by 14: the border must be dropped as transformers does.
CONFIG = VisionConfig(
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    ffn_hidden_size=48,
    image_size=58,
    patch_size=14,
)


@pytest.fixture(scope="module")
def reference():
    """A random SiglipVisionModel of transformers."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=58,
        patch_size=14,
    )
    model = SiglipVisionModel(config).eval()
    with torch.no_grad():  # transformers starts with zero biases and unit norms: hide nothing
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def encoder_of(reference, config=CONFIG):
    encoder = SiglipEncoder(config)
    state = {name.removeprefix("vision_model."): x for name, x in reference.state_dict().items()}
    result = encoder.load_state_dict(state, strict=False)
    assert not result.missing_keys
    assert all(name.startswith("head.") for name in result.unexpected_keys)
    return encoder


@pytest.mark.parametrize("layer", [-2, -3, -4, 0, 3])
def test_features_are_the_hidden_states_of_transformers(reference, layer):
    encoder = encoder_of(reference, dataclasses.replace(CONFIG, feature_layer=layer))
    pixels_ICHW = torch.randn(3, 3, 58, 58, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = reference(pixels_ICHW, output_hidden_states=True).hidden_states[layer]
        got = encoder(pixels_ICHW)
    assert got.shape == (3, 16, 32)
    # measured 0.0: the same torch operations in the same order
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def test_layers_above_the_selected_one_stay_out_of_the_graph():
    encoder = SiglipEncoder(CONFIG)
    encoder(torch.randn(1, 3, 58, 58)).sum().backward()
    without = {id(x) for x in encoder.parameters() if x.grad is None}
    assert without == {id(x) for x in encoder.unused_parameters()}
    assert len(without) == 16 + 2  # one layer and the final norm


def test_no_images_give_no_features_and_zero_gradients():
    encoder = SiglipEncoder(CONFIG)
    features_INF = encoder(torch.empty(0, 3, 58, 58))
    assert features_INF.shape == (0, 16, 32)
    features_INF.sum().backward()
    assert encoder.encoder.layers[0].mlp.fc1.weight.grad.abs().max() == 0


def test_a_graph_may_write_over_what_it_gave_before(monkeypatch):
    """A compiler whose results lie in one memory, as those of a CUDA graph do."""
    encoder = SiglipEncoder(CONFIG).requires_grad_(False)
    batches = torch.randn(3, 2, 3, 58, 58)
    wanted = [encoder(pixels_ICHW) for pixels_ICHW in batches]
    asked, memory = [], torch.empty(2, 16, 32)

    def compiler(call, **options):
        asked.append(options)
        return lambda *args: [memory.copy_(x) for x in call(*args)]

    monkeypatch.setattr(torch, "compile", compiler)
    encoder.graph()
    assert asked == [{"mode": "reduce-overhead"}]
    got = [encoder(pixels_ICHW) for pixels_ICHW in batches]
    assert torch.equal(memory, got[-1])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_the_layers_are_one_graph_with_any_number_of_images(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    encoder = SiglipEncoder(dataclasses.replace(CONFIG, num_layers=2)).requires_grad_(False)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    encoder.encoder.compile(backend=backend, fullgraph=True)
    for number in (4, 2, 3):
        pixels_ICHW = torch.randn(number, 3, 58, 58)
        plain = encoder.encoder.forward(encoder.embeddings(pixels_ICHW), [1])
        torch.testing.assert_close(encoder(pixels_ICHW), plain[0], rtol=0, atol=0)
    assert len(graphs) == 2  # of 4 images, and of any number


def test_wrong_image_size_is_named():
    with pytest.raises(AsvrError, match=r"pixels_ICHW has shape .*H=58"):
        SiglipEncoder(CONFIG)(torch.zeros(1, 3, 56, 56))
