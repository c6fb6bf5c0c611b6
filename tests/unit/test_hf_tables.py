"""The tables: layouts, completeness, and that every family fills the stock model exactly."""

import pytest
import torch

from megatron_asvr.errors import ConversionError
from megatron_asvr.hf import export, official, stock, tables
from tests.unit import hf_models

FAMILIES = list(hf_models.LANGUAGES)
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def test_grouped_qkv_is_per_group_queries_then_key_then_value():
    layout = tables.GroupedQkv(groups=2, queries=2, width=1)
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    whole = layout.join([q, k, v])
    assert whole.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert [p.tolist() for p in layout.split(whole)] == [q.tolist(), k.tolist(), v.tolist()]


def gathered(rule, parts, step):
    """Our tensor, from the places of its elements in the parts, so many at a time."""
    out = torch.empty(rule.shape).flatten()
    for start in range(0, out.numel(), step):
        chunk = out[start : start + step]
        for name, begin, place in rule.cut(start, start + chunk.numel()):
            chunk[place] = parts[name].flatten()[begin : begin + place.stop - place.start]
    return out.view(rule.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rule_is_undone(family):
    cfg = hf_models.config(family)
    rules = tables.llava_rules(cfg.model)
    for rule in rules:
        x = hf_models.tensor_of(rule.name, rule.shape)
        parts = dict(rule.split(x))
        assert {k: tuple(v.shape) for k, v in parts.items()} == dict(rule.parts)
        assert torch.equal(rule.join(parts.__getitem__), x)
        assert torch.equal(gathered(rule, parts, step=x[0].numel()), x)


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_fill_the_stock_models_exactly(family):
    model = hf_models.config(family).model
    export._checked_rules(model, stock.llava_config(model, IDS, 4), stock.LLAVA_ARCHITECTURE)
    text = stock.text_config(model.language, IDS)
    export._checked_rules(model, text, stock.TEXT_ARCHITECTURES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_survive_the_way_through_transformers(family):
    model = hf_models.config(family).model
    config = stock.llava_config(model, IDS, 4)
    found = stock.language_from(config, "here")
    assert found.kv_heads == model.language.kv_heads
    assert found.width_per_head == model.language.width_per_head
    for key in type(found).__dataclass_fields__:
        if key not in ("num_kv_heads", "head_dim"):
            assert getattr(found, key) == getattr(model.language, key), key
    assert stock.vision_from(config, "here") == model.vision


@pytest.mark.parametrize(
    ("layout", "shape", "part"),
    [
        (official.PerDepth(3), (3, 4, 2), (4, 6)),
        (official.Stacked(), (3, 2, 2), (6, 2)),
        (official.WithoutLast(), (4, 3), (5, 3)),
    ],
)
def test_official_layouts_say_where_each_element_lies(layout, shape, part):
    x = torch.arange(float(torch.Size(part).numel())).view(part)
    rule = tables.Rule("ours", shape, (("theirs", part),), layout)
    wanted = rule.join(lambda _: x)
    for step in (5, 100):
        assert torch.equal(gathered(rule, {"theirs": x}, step), wanted)


def test_completeness_names_counts_and_first_offenders():
    wanted = {f"w{i}": (2, 2) for i in range(8)}
    got = {"w7": (2, 3), "extra": (1,)}
    with pytest.raises(ConversionError) as e:
        tables.check_complete("here", got, wanted)
    text = str(e.value)
    assert "7 missing: w0, w1, w2, w3, w4, ... and 2 more" in text
    assert "1 unexpected: extra" in text
    assert "1 wrong shape: w7 [2, 3] instead of [2, 2]" in text
    tables.check_complete("here", dict(wanted), wanted)


def test_llama_has_no_sliding_window():
    from dataclasses import replace

    language = replace(hf_models.language("llama"), sliding_window=8)
    with pytest.raises(ConversionError, match="use family mistral"):
        stock.text_config(language, IDS)
