"""A checkpoint of GPTModel, saved by TP2 x PP2 ranks, becomes a model of ours."""

import argparse
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

from megatron_asvr.platforms import mcore  # noqa: F401

import pytest
import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_asvr.cli.main import main
from megatron_asvr.config.load import load
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf.importer import read_folder
from megatron_asvr.hf.megatron import read_megatron
from megatron_asvr.launch.local import run_ranks
from megatron_asvr.model import sharding
from megatron_asvr.model.language import LanguageModel
from megatron_asvr.parallel import groups as process_groups
from megatron_asvr.parallel.collectives import gather_equal
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.plan import ParallelPlan
from megatron_asvr.train.optim import wrap
from tests.language_cases import from_last_stage, one_rank, plain_batch, rule_batch
from tests.run_cases import config as run_config

pytestmark = pytest.mark.world

DOCUMENT = Path(__file__).parents[2] / "docs" / "conversion.md"
COMMAND = "asvr convert import --from megatron-lm checkpoints --out llama"
PLAN = ParallelPlan(tp=2, pp=2, world=4)
VOCABULARY, PADDED, LENGTH = 301, 384, 24
ARGS: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 4,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 8,
    "ffn_hidden_size": 48,
    "vocab_size": VOCABULARY,
    "padded_vocab_size": PADDED,
    "max_position_embeddings": 64,
    "rotary_base": 5000,
    "norm_epsilon": 1e-5,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
    "num_experts": None,
}


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def stock_model(groups: Groups, *, dtype: torch.dtype, changes: dict[str, Any]) -> GPTModel:
    """This rank's part of a GPTModel as Megatron-LM builds it, drawn from a seed."""
    args = {**ARGS, **changes}
    experts = args["num_experts"]
    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 leaves it out without Transformer Engine
        moe_utils.te_general_gemm = None
    config = TransformerConfig(
        num_layers=args["num_layers"],
        hidden_size=args["hidden_size"],
        num_attention_heads=args["num_attention_heads"],
        num_query_groups=args["num_query_groups"],
        kv_channels=args["kv_channels"],
        ffn_hidden_size=args["ffn_hidden_size"],
        num_moe_experts=experts,
        moe_ffn_hidden_size=args["ffn_hidden_size"] if experts else None,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=args["norm_epsilon"],
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.2,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=PLAN.tp,
        pipeline_model_parallel_size=PLAN.pp,
        expert_tensor_parallel_size=1,
        calculate_per_token_loss=True,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        hetereogenous_dist_checkpoint=changes.get("by_layer", False),
    )
    torch.manual_seed(7)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm", num_experts=experts),
        PADDED,
        args["max_position_embeddings"],
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        position_embedding_type="rope",
        rotary_base=args["rotary_base"],
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.mul_(torch.linspace(0.5, 1.5, len(parameter)))
    return model


@torch.no_grad()
def logits_of(model: GPTModel, groups: Groups) -> Tensor:
    """The logits [B, S, padded vocabulary] of ``tokens``, on every rank."""
    model.eval()  # experts under tensor parallelism may compute, but not train, without SP
    mask = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]

    def forward(model: GPTModel) -> tuple[Tensor, Tensor | None]:
        out = model(tokens(), torch.arange(LENGTH).expand(2, -1), mask)
        if not model.post_process:
            return out, None
        return out, torch.cat(gather_equal(out.contiguous(), group=groups.tp), -1)

    return from_last_stage(model, forward, batch=2, length=LENGTH, groups=groups)


def saved(folder: str, changes: dict[str, Any], extra: dict[str, Any]) -> Tensor:
    """Write a checkpoint as Megatron-LM does; the model's logits."""
    groups = process_groups.initialize(PLAN, 60.0)
    masters = changes.get("masters", False)
    dtype = torch.bfloat16 if masters else torch.float32
    model = stock_model(groups, dtype=dtype, changes=changes)
    found = logits_of(model, groups)
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"} if masters else None
    weights = model.sharded_state_dict(metadata=metadata)
    args = argparse.Namespace(**ARGS | changes | extra)
    state = {"model": weights, "args": args, "iteration": 1000, "checkpoint_version": 3.0}
    if masters:
        settings = run_config(train__optim__distributed=False).train.optim
        wrapped = wrap([model], settings)
        made = OptimizerConfig(optimizer="adam", lr=0.1, bf16=True, params_dtype=torch.bfloat16)
        optimizer = get_megatron_optimizer(made, wrapped)
        for part in optimizer.chained_optimizers:
            for exact in (x for group in part.fp32_from_float16_groups for x in group):
                exact.data.mul_(1 + 2**-12)  # less than bf16 can tell
        state["optimizer"] = optimizer.sharded_state_dict(weights, metadata=metadata)
    out = Path(folder, "iter_0001000")
    if groups.rank == 0:
        out.mkdir(parents=True)
        Path(folder, "latest_checkpointed_iteration.txt").write_text("1000")
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(out))
    process_groups.destroy()
    return found


@torch.no_grad()
def imported_logits(folder: Path) -> Tensor:
    source = read_folder(folder)
    tokens_BS = tokens()
    document_BS, branch_BS, positions_BS = plain_batch(tokens_BS)
    with one_rank() as groups:
        model = LanguageModel(source.language, groups=groups, dtype=torch.float32)
        sharding.load_weights(model, source, groups=groups, prefix="language_model.")
        mask = model.mask(rule_batch(document_BS, branch_BS, positions_BS))
        hidden_SBH = model(model.embed(tokens_BS), positions_BS, mask)
        return model.logits_full(hidden_SBH).transpose(0, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"by_layer": True, "untie_embeddings_and_output_weights": False},
        {"num_experts": 4, "moe_router_topk": 2},
    ],
    ids=["stacked", "by_layer_tied", "experts"],
)
def test_an_imported_gpt_model_computes_the_same(tmp_path, changes, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source, out = tmp_path / "checkpoints", tmp_path / "llama"
    wanted = run_ranks(saved, (str(source), changes, {}), PLAN.world, timeout_s=120)
    assert COMMAND in DOCUMENT.read_text(encoding="utf-8")
    assert main(COMMAND.split()[1:]) == 0
    said = capsys.readouterr().out
    assert "bytes of language_model" in said
    assert (
        f"embedding.word_embeddings.weight[{VOCABULARY}:{PADDED}]"
        in json.loads((out / "import.json").read_text())["ignored"]
    )
    language = load(out / "config.yaml").model.language
    assert (language.vocab_size, language.rope_theta) == (VOCABULARY, 5000.0)
    got = imported_logits(out)
    assert wanted.std() > 0.3
    torch.testing.assert_close(got, wanted[..., :VOCABULARY], rtol=0, atol=1e-4)
    assert main(["convert", "verify", str(source), str(out)]) == 0


def test_master_weights_are_taken_when_asked_for(tmp_path) -> None:
    source = tmp_path / "megatron"
    run_ranks(saved, (str(source), {"masters": True}, {}), PLAN.world, timeout_s=120)
    rounded, exact = read_megatron(source), read_megatron(source, masters=True)
    assert rounded.names == exact.names
    kinds = {name: rounded(name).dtype for name in rounded.names}
    assert set(kinds.values()) == {torch.bfloat16, torch.float32}  # norms are not rounded here
    for name, kind in kinds.items():
        factor = 1 + 2**-12 if kind == torch.bfloat16 else 1
        assert torch.equal(exact(name), rounded(name).float() * factor), name
    command = ["convert", "import", "--from", "megatron-lm", "--masters", str(source)]
    out = tmp_path / "out"
    assert main([*command, "--out", str(out)]) == 0
    again = read_folder(out)
    assert all(torch.equal(again(name), exact(name)) for name in exact.names)
    assert main(["convert", "verify", str(source), str(out)]) == 0


def test_what_is_not_told_or_not_ours_is_refused(tmp_path) -> None:
    source = tmp_path / "megatron"
    odd = {"share": Fraction(1, 2)}  # nothing that megatron-core itself declares safe
    run_ranks(saved, (str(source), {}, odd), PLAN.world, timeout_s=120)
    with pytest.raises(ConversionError, match=r"num_heads.*Fraction.*could run code.*give them"):
        read_megatron(source)
    given = {
        "family": "llama",
        "num_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": VOCABULARY,
        "max_positions": 64,
        "rope_theta": 5000.0,
        "norm_eps": 1e-5,
    }
    overrides = [f"model.language.{key}={value}" for key, value in given.items()]
    language = read_megatron(source, overrides=overrides).language
    assert (language.num_layers, language.ffn_hidden_size) == (4, 48)
    with pytest.raises(ConversionError, match="wrong shape"):
        read_megatron(source, overrides=[*overrides, "model.language.num_kv_heads=4"])
    with pytest.raises(ConversionError, match=r"[0-9] missing: language_model.decoder.layers.4"):
        read_megatron(source, overrides=[*overrides, "model.language.num_layers=5"])
    with pytest.raises(ConversionError, match="unexpected"):
        read_megatron(source, overrides=[*overrides, "model.language.tied_embeddings=true"])
    with pytest.raises(ConversionError, match="no torch_dist checkpoint"):
        read_megatron(tmp_path)
