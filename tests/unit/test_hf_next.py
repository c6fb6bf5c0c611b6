"""Folders of LLaVA-NeXT with a SigLIP tower, and what has no such form."""

from dataclasses import replace

import pytest
import torch
import transformers

from megatron_asvr.config.schema import ResolutionConfig
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf import stock
from megatron_asvr.hf.export import export
from megatron_asvr.hf.importer import read_folder
from tests.unit import hf_models
from tests.unit.test_hf_import import IDS

NEXT = ResolutionConfig(mode="anyres", grids=((1, 2), (3, 1)), newline=True, unpad=True)


def model(**changes):
    return replace(hf_models.config().model, resolution=replace(NEXT, **changes))


def saved(folder, **config):
    """A random model that transformers wrote."""
    made = stock.llava_config(model(), IDS, 4)
    for name, value in config.items():
        setattr(made, name, value)
    theirs = transformers.LlavaNextForConditionalGeneration(made)
    theirs.save_pretrained(folder)
    return theirs


def test_a_stock_folder_is_read_completely(tmp_path):
    theirs = saved(tmp_path)
    found = read_folder(tmp_path)
    assert found.kind == "llava"
    assert found.model.resolution == NEXT
    assert found.vision == hf_models.VISION
    newline = found("projector.image_newline")
    assert torch.equal(newline, theirs.model.image_newline)
    assert found.ignored == ()


def test_grids_that_are_not_of_whole_tiles_are_refused(tmp_path):
    saved(tmp_path, image_grid_pinpoints=[[34, 68], [34, 69]])
    with pytest.raises(ConversionError, match=r"no multiples of image_size=34"):
        read_folder(tmp_path)


def test_several_scales_are_not_exported(tmp_path):
    config = replace(hf_models.config(), model=model(mode="s2", newline=False, unpad=False))
    text = hf_models.train_tokenizer(tmp_path / "text.model")
    with pytest.raises(
        ConversionError, match=r"mode=s2 has no stock form: .*; train with .*single"
    ):
        export(hf_models.state(config).items(), config, tokenizer=text, out=tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("setting", ["newline", "unpad"])
def test_what_transformers_would_compute_otherwise_is_not_exported(setting, tmp_path):
    config = replace(hf_models.config(), model=model(**{setting: False}))
    text = hf_models.train_tokenizer(tmp_path / "text.model")
    message = f"resolution.{setting}=false has no stock form: .*train .* with .*unpad=true"
    with pytest.raises(ConversionError, match=message):
        export(hf_models.state(config).items(), config, tokenizer=text, out=tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
