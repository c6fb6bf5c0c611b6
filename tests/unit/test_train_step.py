"""One optimizer step on one rank."""

import math

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_asvr.config.schema import LossConfig
from megatron_asvr.errors import AsvrError
from megatron_asvr.model import visual_head
from megatron_asvr.model.loss import joint_loss, official_loss
from megatron_asvr.train.optim import learning_rate
from megatron_asvr.train.passes import backward
from megatron_asvr.train.start import idle_settings
from megatron_asvr.train.step import Agreement, agree, loss_function, train_step
from tests.language_cases import one_rank
from tests.run_cases import Bench, config, micro_batch, step_batches


def gradients(bench: Bench) -> dict[str, torch.Tensor]:
    named = bench.model.named_parameters()
    return {name: p.main_grad.clone() for name, p in named if p.requires_grad}


@pytest.mark.parametrize("part_bytes", [visual_head.PART_BYTES, 1])
def test_gradients_are_those_of_the_global_loss_and_nothing_rescales_them(
    part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visual_head, "PART_BYTES", part_bytes)
    run = config(loss__visual_weight=0.7)
    with one_rank() as groups:
        bench = Bench(run, groups)
        batches = step_batches(run, 0, groups)
        agreement = agree(batches, stop=False, groups=groups)
        assert agreement.text_count == sum(b.num_text_targets for b in batches)
        bench.wrapped[0].zero_grad_buffer()
        loss = loss_function(run.loss, agreement, num_micro_batches=len(batches))
        parts = backward(bench.wrapped, batches, loss)

        sums = [bench.model(batch) for batch in batches]
        text = sum(s.text_sum for s in sums) / sum(s.text_count for s in sums)
        visual = sum(s.visual_sum_D.sum() for s in sums) / sum(s.visual_count for s in sums)
        wanted = text + 0.7 * visual / 3
        assert float(sum(p.loss for p in parts)) == pytest.approx(float(wanted), rel=1e-6)
        trained = [(n, p) for n, p in bench.model.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad(wanted, [p for _, p in trained])
        got = gradients(bench)
        for (name, _), grad in zip(trained, grads, strict=True):
            torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_compiled_layers_are_the_same_ones_where_there_is_no_compiler() -> None:
    with one_rank() as groups:
        plain, compiled = (Bench(config(train__compile=on), groups) for on in (False, True))
        layers = [*compiled.model.vision_encoder.encoder.layers, *compiled.model.visual_head.layers]
        assert all(layer._compiled_call_impl is not None for layer in layers)
        assert [plain.step(n).loss for n in range(2)] == [compiled.step(n).loss for n in range(2)]
        assert list(plain.weights()) == list(compiled.weights())
        assert idle_settings(compiled.model.run_config.train) == ["compile"]


def test_a_recorded_encoder_has_the_same_losses_where_nothing_can_be_recorded() -> None:
    frozen = {"train__trainable": ["projector", "visual_head", "language_model"]}
    runs = [config(train__compile=on, train__cuda_graphs=on, **frozen) for on in (False, True)]
    with one_rank() as groups:
        plain, recorded = (Bench(run, groups) for run in runs)
        stack = recorded.model.vision_encoder.encoder
        assert stack._compiled_call_impl is not None
        assert all(layer._compiled_call_impl is None for layer in stack.layers)
        assert [plain.step(n).loss for n in range(2)] == [recorded.step(n).loss for n in range(2)]
        assert idle_settings(runs[1].train) == ["compile", "cuda_graphs"]


def test_official_mode_takes_the_mean_of_each_micro_batch() -> None:
    run = config()
    with one_rank() as groups:
        bench = Bench(run, groups)
        agreement = Agreement(text_count=999, visual_count=999, num_tokens=1, digest=0, stop=False)
        sums = bench.model(micro_batch(run, 1))
        part = loss_function(LossConfig(mode="official"), agreement, num_micro_batches=2)(sums)
        assert float(part) == float(official_loss(sums, visual_weight=1.0)) / 2
        exact = loss_function(LossConfig(), agreement, num_micro_batches=2)(sums)
        wanted = joint_loss(sums, global_text_count=999, global_visual_count=999, visual_weight=1.0)
        assert float(exact) == float(wanted)


def test_only_trained_parts_move_and_a_text_batch_trains_nothing_in_stage_one() -> None:
    run = config(train__trainable=["projector", "visual_head"], train__optim__weight_decay=0.0)
    with one_rank() as groups:
        bench = Bench(run, groups)
        before = bench.weights()
        bench.step(0)
        bench.step(1)  # the first step's rate is 0: the warm-up starts there
        after = bench.weights()
        moved = {n.split(".")[0] for n in before if not torch.equal(before[n], after[n])}
        assert moved == {"projector", "visual_head"}

        text = [micro_batch(run, 1, images=(0, 0))]
        agreement = agree(text, stop=False, groups=groups)
        loss = loss_function(run.loss, agreement, num_micro_batches=1)
        result = train_step(bench.wrapped, bench.optimizer, text, loss, step=2, groups=groups)
        assert result.grad_norm == 0.0
        assert result.loss > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_copied_only_from_masters_of_their_own(precision) -> None:
    """In fp32 the optimizer updates the model's weights themselves (platforms/replacements.py)."""
    run = config(train__precision=precision)
    with one_rank() as groups:
        bench = Bench(run, groups)
        bench.step(0)  # the first step's rate is 0: the warm-up starts there
        before = bench.weights()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
            bench.step(1)
        name = "language_model.output_layer.weight"
        assert not torch.equal(before[name], bench.weights()[name])
        copies = [e.input_shapes[0] for e in found.events() if e.name == "aten::copy_"]
        assert ([before[name].numel()] in copies) == (precision == "bf16")


def test_a_loss_that_is_not_finite_names_rank_step_and_samples() -> None:
    run = config()
    with one_rank() as groups:
        bench = Bench(run, groups)
        before = bench.weights()
        batches = [micro_batch(run, 1), micro_batch(run, 2)]
        batches[1].pixel_values_ICHW[:] = math.nan
        agreement = agree(batches, stop=False, groups=groups)
        loss = loss_function(run.loss, agreement, num_micro_batches=2)
        with pytest.raises(AsvrError, match=r"step 7: .*rank 0.*sample 2\.0, sample 2\.1") as err:
            train_step(bench.wrapped, bench.optimizer, batches, loss, step=7, groups=groups)
        assert "sample 1." not in str(err.value)
        after = bench.weights()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("clip_grad", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_is_an_error(clip_grad: float) -> None:
    run = config(train__optim__clip_grad=clip_grad)
    with one_rank() as groups:
        bench = Bench(run, groups)
        batches = step_batches(run, 0, groups)
        agreement = agree(batches, stop=False, groups=groups)
        loss = loss_function(run.loss, agreement, num_micro_batches=2)
        bench.model.projector.linear_1.bias.register_hook(lambda grad: grad * math.inf)
        before = bench.weights()
        with pytest.raises(AsvrError, match="step 3, rank 0: the losses are finite but"):
            train_step(bench.wrapped, bench.optimizer, batches, loss, step=3, groups=groups)
        after = bench.weights()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_rate_warms_up_from_zero_and_ends_at_its_minimum() -> None:
    run = config(train__steps=10, train__optim__min_lr=1e-3)
    with one_rank() as groups:
        bench = Bench(run, groups)
        rates = []
        for step in range(10):
            rates.append(learning_rate(bench.optimizer))
            bench.step(step)
        assert rates[:3] == [0.0, 0.005, 0.01]
        assert rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True)
        assert learning_rate(bench.optimizer) == pytest.approx(1e-3)
        # A continued run computes the same rate from the step alone.
        assert learning_rate(Bench(run, groups, done_steps=6).optimizer) == rates[6]


def test_biases_and_norms_do_not_decay() -> None:
    with one_rank() as groups:
        bench = Bench(config(), groups)
        names = {id(p): n for n, p in bench.model.named_parameters()}
        decay: dict[str, float] = {}
        inner = bench.optimizer.chained_optimizers[0]
        for model_params, group in zip(
            inner.model_fp32_groups, inner.optimizer.param_groups, strict=True
        ):
            decay |= {names[id(p)]: group["weight_decay"] for p in model_params}
        assert decay["projector.linear_1.weight"] == 0.1
        assert decay["visual_head.layers.0.mlp.w1"] == 0.1
        assert decay["visual_head.layers.0.attention.in_proj.bias"] == 0.0  # two dimensions
        assert decay["language_model.decoder.final_layernorm.weight"] == 0.0
