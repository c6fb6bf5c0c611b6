"""The whole model on one rank: what it computes for which batch, and what it trains."""

import dataclasses

import pytest
import torch

from megatron_asvr.config.schema import DataConfig, LossConfig, OptimConfig
from megatron_asvr.errors import ConfigError
from megatron_asvr.model import sharding
from megatron_asvr.model.asvr import AsvrModel, build_model
from megatron_asvr.model.loss import LossSums, joint_loss
from megatron_asvr.train.optim import wrap
from tests.asvr_cases import CONFIG, SIZES, build, config, gradients, micro_batch, tokenizer
from tests.language_cases import one_rank


@pytest.fixture(scope="module")
def groups():
    with one_rank() as made:
        yield made


def loss_of(sums: LossSums) -> torch.Tensor:
    return joint_loss(
        sums,
        global_text_count=sums.text_count,
        global_visual_count=sums.visual_count,
        visual_weight=0.5,
    )


def test_sums_and_counts_of_a_batch(groups):
    batch = micro_batch("images")
    sums = build(CONFIG, groups)(batch)
    assert sums.text_count == batch.num_text_targets
    assert sums.visual_count == 12
    assert sums.visual_sum_D.shape == (3,)
    assert sums.codes_MD.shape == (12, 3)
    assert all(int(sums.codes_MD[:, d].max()) < size for d, size in enumerate(SIZES))
    assert 0 <= int(sums.text_correct) <= sums.text_count


def test_features_replace_the_image_tokens(groups):
    model, batch = build(CONFIG, groups), micro_batch("images")
    embeds_SBH = model.embeddings(batch)
    plain_SBH = model.language_model.embed(batch.tokens_BS)
    features_PF = model.vision_encoder(batch.pixel_values_ICHW).flatten(0, 1)
    wanted_PH = model.projector(features_PF)
    torch.testing.assert_close(embeds_SBH[2, 0], wanted_PH[1])  # sample 0, image 0, patch 1
    torch.testing.assert_close(embeds_SBH[7, 1], wanted_PH[8])  # sample 1, image 2, patch 0
    assert torch.equal(embeds_SBH[6, 1], plain_SBH[6, 1])


def test_questions_of_one_image_do_not_see_each_other(groups):
    model, batch = build(CONFIG, groups), micro_batch("images")
    before_SBH = model.hidden(batch)
    tokens_BS = batch.tokens_BS.clone()
    tokens_BS[0, 5:9] = (tokens_BS[0, 5:9] + 1) % 101  # question A
    after_SBH = model.hidden(dataclasses.replace(batch, tokens_BS=tokens_BS))
    same = (before_SBH == after_SBH).all(-1)
    assert same[:5, 0].all()  # the image
    assert not same[5:9, 0].any()
    assert same[9:14, 0].all()  # question B
    assert same[:, 1].all()


@pytest.mark.parametrize("kind", ["images", "no_images", "no_text", "one_image"])
def test_every_trained_parameter_gets_a_gradient(kind, groups):
    model = build(CONFIG, groups)
    loss = loss_of(model(micro_batch(kind)))
    loss.backward()
    found = gradients(model)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in found.values())
    visual = {name for name in found if name.startswith(("vision_encoder", "visual_head"))}
    if kind == "no_images":
        assert all(found[name].abs().max() == 0 for name in visual)
    else:
        moved = {name for name in visual if found[name].abs().max() > 0}
        # key biases have no gradient but rounding, and rounding may give exactly zero
        assert len(moved) > 0.9 * len(visual)


def test_images_without_captions_train_the_visual_loss(groups):
    sums = build(CONFIG, groups)(micro_batch("no_text"))
    assert sums.text_count == 0
    assert sums.text_sum == 0
    loss = loss_of(sums)
    assert loss.item() == pytest.approx(0.5 * (sums.visual_sum_D.sum() / 3 / 12).item())


def test_cached_codes_give_the_loss_of_online_codes(groups):
    model, batch = build(CONFIG, groups), micro_batch("images")
    codes_PD = tokenizer().encode(batch.pixel_values_ICHW).flatten(0, 1)
    cached = dataclasses.replace(batch, codes_PD=codes_PD)
    assert loss_of(model(cached)) == loss_of(model(batch))


def test_codes_of_nowhere_are_an_error(groups):
    cached = dataclasses.replace(CONFIG, data=DataConfig(codes="cache"))
    with pytest.raises(ConfigError, match="code cache"):
        build(cached, groups)(micro_batch("images"))


def test_a_position_can_predict_another_patch(groups):
    """With ``target_shift`` the data pipeline hands over other pairs of position and patch."""
    model, batch = build(CONFIG, groups), micro_batch("one_image")
    shifted = dataclasses.replace(
        batch,
        visual_positions_M=torch.arange(0, 4),  # the token before the image predicts patch 0
        visual_patches_M=torch.arange(0, 4),
    )
    assert torch.equal(model(shifted).codes_MD, model(batch).codes_MD)
    assert loss_of(model(shifted)) != loss_of(model(batch))


def test_frozen_parts_and_unused_layers_do_not_train(groups):
    model = build(config(trainable=("projector", "visual_head")), groups)
    loss_of(model(micro_batch("images"))).backward()
    trained = {name.split(".")[0] for name, x in model.named_parameters() if x.requires_grad}
    assert trained == {"projector", "visual_head"}
    assert all(x.grad is None for x in model.language_model.parameters())
    everything = build(CONFIG, groups)
    unused = {name for name, x in everything.named_parameters() if not x.requires_grad}
    assert all("layers.2." in name or "post_layernorm" in name for name in unused)
    assert len(unused) == 18


def leaves(loss: torch.Tensor) -> set[int]:
    """The parameters that a graph adds gradients to."""
    found, seen, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [parent for parent, _ in node.next_functions]
    return found


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("parts", [("visual_head",), ("projector", "visual_head")])
def test_frozen_parts_build_no_graph_and_keep_no_gradients(parts, recompute, groups):
    model, batch = (
        build(config(trainable=parts, recompute=recompute), groups),
        micro_batch("images"),
    )
    assert not model.encode_images(batch).requires_grad
    assert model.hidden(batch).requires_grad == ("projector" in parts)
    sums = model(batch)
    assert sums.text_sum.requires_grad == ("projector" in parts)
    loss = loss_of(sums)
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    assert {name.partition(".")[0] for name in trained} == set(parts)
    assert leaves(loss) == {id(x) for x in trained.values()}
    loss.backward()
    assert all((x.grad is None) == (name not in trained) for name, x in model.named_parameters())
    (wrapped,) = wrap([model], OptimConfig())
    assert {id(x) for x in wrapped.buffers[0].param_to_bucket} == {id(x) for x in trained.values()}


def test_the_baseline_builds_neither_head_nor_codes(groups):
    baseline = dataclasses.replace(CONFIG, loss=LossConfig(visual_weight=0.0))
    model = AsvrModel(baseline, groups=groups, tokenizer=None)
    assert "visual_head" not in model.parts()
    sums = model(micro_batch("images"))
    assert sums.visual_sum_D.numel() == 0
    assert sums.codes_MD is None


def test_a_visual_loss_needs_a_tokenizer_that_fits(groups):
    with pytest.raises(ConfigError, match="asvr tokenizer fit"):
        AsvrModel(CONFIG, groups=groups, tokenizer=None)
    finer = dataclasses.replace(CONFIG.model.vision, patch_size=4)
    other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, vision=finer))
    with pytest.raises(ConfigError, match="4 x 4 patches"):
        AsvrModel(other, groups=groups, tokenizer=tokenizer())


def test_weights_come_from_the_seed_and_the_parts_scales(groups):
    first, again = (build_model(CONFIG, groups=groups, tokenizer=tokenizer()) for _ in range(2))
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.visual_head.layers[0].mlp.w1.std().item() == pytest.approx(0.2, rel=0.1)
    down = first.language_model.decoder.layers[0].mlp.linear_fc2.weight
    assert down.std().item() == pytest.approx(0.2 / 2, rel=0.1)  # sqrt(2 * 2 layers)


def test_checkpoint_keys_are_the_canonical_names(groups):
    model = build(CONFIG, groups)
    state = model.sharded_state_dict(prefix="model.")
    keys = {x.key for name, x in state.items() if not name.endswith("_extra_state")}
    assert keys == {f"model.{name}" for name in sharding.canonical_names(model).values()}
    assert not any("tokenizer" in key or "codebooks" in key for key in keys)


def test_bf16_computes_the_losses_in_fp32(groups):
    batch = micro_batch("images")
    wanted = loss_of(build(CONFIG, groups)(batch))
    model = build(config(precision="bf16"), groups)
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    sums = model(batch)
    assert sums.visual_sum_D.dtype == sums.text_sum.dtype == torch.float32
    assert loss_of(sums).item() == pytest.approx(wanted.item(), rel=0.02)
