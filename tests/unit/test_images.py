"""One pass of an encoder for features and codes, and layers that nothing reads."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_asvr.config.schema import Config, DataConfig, ParallelConfig, ResolutionConfig
from megatron_asvr.model.asvr import AsvrModel
from megatron_asvr.model.images import one_pass
from megatron_asvr.model.tokenizer import VisualTokenizer
from megatron_asvr.model.vision import SiglipEncoder
from megatron_asvr.planner.parameters import left_out
from megatron_asvr.train.work import useful_rates
from tests import asvr_cases
from tests.asvr_cases import CONFIG, build, micro_batch
from tests.language_cases import one_rank

FROZEN = asvr_cases.config(trainable=("projector", "language_model", "visual_head"))


@pytest.fixture(scope="module")
def groups():
    with one_rank() as made:
        yield made


def at_layers(own: int, its: int) -> tuple[Config, VisualTokenizer]:
    """A run and its tokenizer, whose encoders stop at these hidden states."""
    vision = dataclasses.replace(CONFIG.model.vision, feature_layer=own)
    model = dataclasses.replace(CONFIG.model, vision=vision)
    made = asvr_cases.tokenizer()
    made.config = dataclasses.replace(made.config, feature_layer=its)
    made.encoder.config = dataclasses.replace(made.encoder.config, feature_layer=its)
    return dataclasses.replace(FROZEN, model=model), made


def built(config: Config, tokenizer: VisualTokenizer, groups) -> AsvrModel:
    """The model with the tokenizer's encoder; both without what they do not read."""
    model = build(config, groups)
    model.images.tokenizer = tokenizer
    model.vision_encoder.load_state_dict(tokenizer.encoder.state_dict())
    model.leave_out_unused()
    tokenizer.leave_out_unused()
    return model


@pytest.mark.parametrize(("own", "its"), [(-2, -2), (-2, -3), (-3, -1)])
def test_one_pass_gives_the_features_and_codes_of_two(own, its, groups):
    model = built(*at_layers(own, its), groups)
    passes = []
    for encoder in (model.vision_encoder, model.images.tokenizer.encoder):
        encoder.embeddings.register_forward_hook(lambda *_: passes.append(1))
    batch = micro_batch("images")
    apart = model.images.features(batch).flatten(0, 1), model.images.codes(batch)
    wanted = model(batch)
    assert len(passes) == 4
    told = model.images.join(model.images.tokenizer)
    assert told == "one pass for features and codes: the tokenizer's encoder is the model's"
    for got, want in zip(model.images.both(batch), apart, strict=True):
        assert torch.equal(got, want)
    got = model(batch)
    assert len(passes) == 6
    assert torch.equal(got.visual_sum_D, wanted.visual_sum_D)
    assert torch.equal(got.text_sum, wanted.text_sum)


@pytest.mark.parametrize(("own", "its"), [(-2, -3), (-3, -1)])
def test_the_work_of_both_is_what_torch_counts(own, its, groups):
    model = built(*at_layers(own, its), groups)
    config, made, batch = model.run_config, model.images.tokenizer, micro_batch("images")
    for joined in (False, True):
        if joined:
            model.images.join(made)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            if joined:
                model.images.both(batch)
            else:
                model.images.features(batch)
                model.images.codes(batch)
        found = useful_rates(config, made, joined=joined)
        wanted = (found.encoder + found.tokenizer) * batch.num_images
        assert counter.get_total_flops() == wanted, joined


def test_joined_encoders_share_their_memory(groups):
    model = built(*at_layers(-2, -3), groups)
    model.images.join(model.images.tokenizer)
    own = dict(model.vision_encoder.named_parameters())
    for name, parameter in model.images.tokenizer.encoder.named_parameters():
        assert parameter.data_ptr() == own[name].data_ptr()


def test_an_empty_micro_batch_goes_through_the_one_pass_too(groups):
    model = built(*at_layers(-2, -2), groups)
    model.images.join(model.images.tokenizer)
    assert model(micro_batch("no_images")).visual_count == 0


def other(name: str) -> tuple[Config, VisualTokenizer]:
    """A run and a tokenizer that cannot share a pass."""
    config, tokenizer = at_layers(-2, -2)
    if name == "trained":
        return CONFIG, tokenizer
    if name == "cache":
        return dataclasses.replace(config, data=DataConfig()), tokenizer
    if name == "stages":
        return dataclasses.replace(config, parallel=ParallelConfig(pp=2)), tokenizer
    if name == "scales":
        resolution = ResolutionConfig(mode="s2", scales=(1, 2))
        model = dataclasses.replace(config.model, resolution=resolution)
        return dataclasses.replace(config, model=model), tokenizer
    if name == "heads":
        vision = dataclasses.replace(config.model.vision, num_heads=4)
        model = dataclasses.replace(config.model, vision=vision)
        return dataclasses.replace(config, model=model), tokenizer
    if name == "dtype":
        tokenizer.encoder.bfloat16()
    if name == "weight":
        with torch.no_grad():
            tokenizer.encoder.encoder.layers[1].mlp.fc2.bias[3] += 1e-7
    if name == "unread":
        with torch.no_grad():
            tokenizer.encoder.encoder.layers[2].mlp.fc2.bias[3] += 1
    return config, tokenizer


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("trained", "the model's encoder is trained"),
        ("cache", "codes come from the cache"),
        ("stages", "parallel.pp=2"),
        ("scales", "several scales"),
        ("heads", "differs from model.vision"),
        ("dtype", "another embeddings.patch_embedding.weight"),
        ("weight", "another encoder.layers.1.mlp.fc2.bias"),
        ("unread", None),
    ],
)
def test_passes_are_joined_only_where_nothing_changes(name, reason):
    config, tokenizer = other(name)
    weights = dict(at_layers(-2, -2)[1].encoder.named_parameters())
    joined, told = one_pass(config, tokenizer, weights.get)
    assert joined == (reason is None)
    assert reason is None or reason in told


@pytest.mark.parametrize("layer", [-2, -1, 0])
def test_layers_that_nothing_reads_are_left_out(layer):
    vision = dataclasses.replace(CONFIG.model.vision, feature_layer=layer)
    encoder = SiglipEncoder(vision)
    pixels = torch.randn(2, 3, 16, 16)
    wanted, before = encoder(pixels), sum(x.numel() for x in encoder.parameters())
    number = encoder.leave_out_unused()
    assert number == left_out(vision) == before - sum(x.numel() for x in encoder.parameters()) > 0
    assert len(encoder.encoder.layers) == vision.num_feature_layers
    assert torch.equal(encoder(pixels), wanted)
    assert encoder.unused_parameters() == []
