"""Exports in fp32 hold the optimizer's master weights, whatever the layout that trained them."""

from collections.abc import Iterator
from pathlib import Path

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch
from torch import Tensor, nn

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.reader import read_run
from megatron_asvr.config.schema import Config
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.hf.importer import read_folder
from megatron_asvr.hf.run import export_run
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.model.sharding import full_state
from megatron_asvr.parallel import groups as process_groups
from megatron_asvr.parallel.collectives import all_reduce_sum
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.plan import make_plan
from tests.run_cases import CODEBOOK_SIZES, Bench, config, folder, save

pytestmark = pytest.mark.world

LM = "language_model."


def masters(bench: Bench, groups: Groups) -> dict[str, Tensor]:
    """The optimizer's own fp32 weights, full, by canonical name."""
    held = {}
    for part in getattr(bench.optimizer, "chained_optimizers", [bench.optimizer]):
        for parameter, master in pairs(part):
            whole = torch.zeros(parameter.numel())
            where = slice(None)
            if hasattr(part, "shard_fp32_from_float16_groups"):
                place = part._get_model_param_range_map(parameter)["param"]
                where = slice(place.start, place.end)
            whole[where] = master.detach().float().flatten()
            held[parameter] = whole

    def of(parameter: nn.Parameter) -> Tensor:
        whole = held.get(parameter, torch.zeros(parameter.numel()))
        if bench.run.train.optim.distributed:  # every rank holds other elements
            whole = all_reduce_sum(whole, group=groups.dp_cp)
        return whole.view(parameter.shape)

    found = full_state(bench.chunks, groups=groups, only=lambda _, p: p.requires_grad, of=of)
    return {name: x.clone() for name, x in found}


def pairs(optimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    kind = "shard_fp32_from" if hasattr(optimizer, "model_float16_groups") else "fp32_from"
    models = "model_float16_groups" if kind.startswith("shard") else "float16_groups"
    for model, exact in zip(
        getattr(optimizer, models), getattr(optimizer, f"{kind}_float16_groups"), strict=True
    ):
        yield from zip(model, exact, strict=True)


def trained(run: Config, path: Path, world: int) -> dict[str, Tensor]:
    groups = process_groups.initialize(make_plan(run, world, CODEBOOK_SIZES), 60.0)
    bench = Bench(run, groups)
    for step in range(2):
        bench.step(step)
    save(bench, RunFolder(path), 2)
    return masters(bench, groups)


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, {"train__optim__distributed": False}),
        (2, {}),
        (4, {"parallel__tp": 2, "parallel__pp": 2}),
        (4, {"parallel__tp": 2}),
    ],
    ids=["plain", "dp2", "tp2_pp2", "tp2_dp2"],
)
def test_an_fp32_export_of_a_bf16_run_is_its_master_weights(tmp_path, world, changes) -> None:
    text = TextTokenizer.train(
        ["USER: yes no ASSISTANT: red"] * 40, tmp_path / "t.model", vocab_size=290
    )
    run = config(
        train__precision="bf16",
        train__micro_batch=1,
        train__trainable=["language_model", "projector"],
        model__text_tokenizer=str(text.path),
        model__language__vocab_size=300,
        **changes,
    )
    path = folder(tmp_path / "run").root
    wanted = run_ranks(trained, (run, path, world), world, timeout_s=120)
    _, exact = read_run(path, masters=True)
    _, rounded = read_run(path)
    rounding = 0
    for name, master in wanted.items():
        assert exact(name).dtype == torch.float32, name
        assert torch.equal(exact(name), master), name
        assert rounded(name).dtype == torch.bfloat16, name
        assert torch.equal(rounded(name), master.bfloat16()), name
        rounding += int((rounded(name).float() != master).sum())
    assert rounding > 10_000  # the two do differ
    assert exact("vision_encoder.post_layernorm.weight").dtype == torch.bfloat16  # not trained

    for dtype in ("fp32", "bf16"):
        export_run(str(path), str(tmp_path / dtype), dtype=dtype, kind="text")
    in_fp32, in_bf16 = read_folder(tmp_path / "fp32"), read_folder(tmp_path / "bf16")
    names = [name for name in wanted if name.startswith(LM)]
    assert sorted(in_fp32.names) == sorted(names)
    for name in names:
        assert torch.equal(in_fp32(name), wanted[name]), name
        assert torch.equal(in_bf16(name), rounded(name)), name
