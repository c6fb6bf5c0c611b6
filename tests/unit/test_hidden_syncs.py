"""Where a step on a GPU would make its host wait, counted on the CPU."""

import dataclasses
from collections import Counter

from megatron_asvr.platforms import mcore, select  # noqa: F401

import pytest
import torch

from megatron_asvr.batch import MicroBatch
from megatron_asvr.model.asvr import AsvrModel
from megatron_asvr.train.passes import to_device
from megatron_asvr.train.step import agree, loss_function, train_step
from tests.language_cases import one_rank
from tests.run_cases import Bench, config, micro_batch
from tests.syncs import KNOWN, Waits


def waits(number: int, **changes: object) -> Counter[str]:
    """Of a second step (megatron-core 0.19 asks once more in the first)."""
    run = config(**changes)
    with one_rank() as groups:
        bench = Bench(run, groups)
        batches = [micro_batch(run, seed) for seed in range(number)]
        agreement = agree(batches, stop=False, groups=groups)
        loss = loss_function(run.loss, agreement, num_micro_batches=number)
        bench.step(0)
        with Waits() as found:
            train_step(bench.wrapped, bench.optimizer, batches, loss, step=1, groups=groups)
    return found.places


@pytest.mark.parametrize(
    "changes",
    [{}, {"train__precision": "bf16"}, {"train__recompute": "full"}],
    ids=["fp32", "bf16", "recomputed"],
)
@pytest.mark.parametrize("number", [1, 3])
def test_a_step_waits_for_the_device_at_known_places(number: int, changes: dict) -> None:
    assert waits(number, **changes) == KNOWN


def test_one_pass_for_features_and_codes_asks_nothing_more(monkeypatch) -> None:
    """Lengths of documents are known to the host; asked again, their tensor is the device's."""
    run = config(
        data__codes="online", train__trainable=["projector", "visual_head", "language_model"]
    )
    asked, plain = [], MicroBatch.host_lengths
    monkeypatch.setattr(MicroBatch, "host_lengths", lambda x: asked.append(1) or plain(x))
    with one_rank() as groups:
        bench = Bench(run, groups)
        images = bench.model.images
        bench.model.vision_encoder.load_state_dict(images.tokenizer.encoder.state_dict())
        assert images.join(images.tokenizer).startswith("one pass")
        batches = [dataclasses.replace(micro_batch(run, seed), codes_PD=None) for seed in range(3)]
        loss = bench.loss(batches)
        bench.step(0, batches)
        asked.clear()
        with Waits() as found:
            train_step(bench.wrapped, bench.optimizer, batches, loss, step=1, groups=groups)
    assert found.places == KNOWN
    assert len(asked) == 3


def test_a_planted_item_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = AsvrModel._visual

    def _visual(self, hidden_SBH, batch, scales_D):
        assert hidden_SBH.sum().item() != 0.0
        return plain(self, hidden_SBH, batch, scales_D)

    monkeypatch.setattr(AsvrModel, "_visual", _visual)
    more = waits(3)
    more.subtract(KNOWN)
    assert +more == {"model/asvr.py:forward": 3}


QUESTIONS = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "int": lambda x: int(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked": lambda x: x.index_put_((x > 0,), torch.ones(3)),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.repeat_interleave(x.long()),
    "synchronize": lambda _: select()[0].synchronize(),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_to_a_tensor_counts(name: str) -> None:
    with Waits() as found:
        QUESTIONS[name](torch.ones(3))
    assert found.places


def test_arithmetic_asks_nothing() -> None:
    x = torch.ones(3, requires_grad=True)
    with Waits() as found:
        (x * x)[torch.tensor([0, 2])].sum().backward()
        x.detach().to(torch.bfloat16).masked_fill(x > 0, 1.0)
        x.detach().clone()[x > 0] = 0.0
    assert not found.places


def test_every_tensor_of_a_batch_is_brought_and_nothing_is_lost(monkeypatch) -> None:
    """A platform that marks what it brings: the batch that the model gets is made of that."""
    from megatron_asvr.platforms.cpu import CpuPlatform

    monkeypatch.setattr(CpuPlatform, "bring", lambda _, x: x.clone())
    batch = micro_batch(config(), 1)
    with Waits() as found:
        moved = to_device(batch)
    assert not found.places
    assert torch.equal(moved.document_lengths_Bn, batch.host_lengths())
    for name in set(batch.__slots__) - {"document_lengths_Bn"}:
        before, after = getattr(batch, name), getattr(moved, name)
        if isinstance(before, torch.Tensor):
            assert torch.equal(before, after)
            assert before is not after
        else:
            assert before is after
