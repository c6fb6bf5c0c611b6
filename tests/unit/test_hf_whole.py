"""A whole LLaVA model of transformers starts a model of ours that computes the same."""

from dataclasses import replace

import pytest
import torch
import transformers

from megatron_asvr.config.schema import Config, InitConfig, LossConfig, TrainConfig
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf.importer import read_folder
from megatron_asvr.model.asvr import build_model
from megatron_asvr.train.weight_sources import load_sources
from tests.language_cases import one_rank
from tests.unit import hf_models
from tests.unit.test_hf_import import stock_model
from tests.unit.test_hf_model import batch_of

TEXT_LENGTH = 9


@pytest.fixture(scope="module")
def groups():
    with one_rank() as made:
        yield made


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_an_imported_llava_computes_what_transformers_does(family, groups, tmp_path):
    theirs = stock_model("llava", family).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    folder = read_folder(tmp_path)
    config = Config(
        model=folder.model,
        init=InitConfig(all=str(tmp_path)),
        loss=LossConfig(visual_weight=0.0),
        train=TrainConfig(precision="fp32"),
    )
    ours = build_model(config, groups=groups, tokenizer=None)
    origins = load_sources([ours], config, facts={}, groups=groups)
    assert set(origins.values()) == {str(tmp_path)}

    patches, image = hf_models.VISION.num_patches, theirs.config.image_token_index
    text = torch.randint(5, 400, (TEXT_LENGTH,), generator=torch.Generator().manual_seed(3))
    ids = [1, *[image] * patches, *text.tolist(), *[image] * patches, *text.flip(0).tolist()]
    pixels = hf_models.tensor_of("pixels", (2, 3, 34, 34))
    wanted_ST = theirs(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]
    places = [i for i, token in enumerate(ids) if token == image]
    hidden_SBH = ours.hidden(batch_of(ids, places, pixels))
    got_ST = ours.language_model.logits_full(hidden_SBH[:, 0])
    assert wanted_ST.std() > 0.3
    torch.testing.assert_close(got_ST, wanted_ST, rtol=0, atol=1e-4)


def test_a_siglip2_of_variable_resolution_is_refused(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.Siglip2VisionConfig(**sizes, intermediate_size=8, num_patches=16)
    transformers.Siglip2VisionModel(vision).save_pretrained(tmp_path / "tower")
    with pytest.raises(ConversionError, match=r"variable resolution .*json says SiglipModel"):
        read_folder(tmp_path / "tower")
    llava = transformers.LlavaConfig(vision_config=vision)
    llava.architectures = ["LlavaForConditionalGeneration"]
    llava.save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="variable resolution"):
        read_folder(tmp_path)


@pytest.mark.parametrize(("size", "patch"), [(512, 16), (384, 14), (256, 16)])
def test_siglip2_of_fixed_resolution_is_siglip(size, patch):
    """Published sizes: a border that fills no patch is dropped, as transformers does."""
    vision = replace(hf_models.VISION, image_size=size, patch_size=patch)
    stock = transformers.SiglipVisionConfig(image_size=size, patch_size=patch)
    model = transformers.models.siglip.modeling_siglip.SiglipVisionEmbeddings(stock)
    assert vision.num_patches == model.num_patches
