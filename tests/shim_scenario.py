"""Training, recomputation and checkpoints on bare megatron-core, without one of the shims.

``python -m tests.shim_scenario NAME...`` runs it once per name, each time in a new process without
the shim of that name (``-`` leaves none out), and prints one JSON object a line: name, error, uses.
"""

import contextlib
import functools
import json
import os
import queue
import signal
import sys
import tempfile

from megatron_asvr.platforms import redirects, shims

import torch


def install(stage: str, skip: str) -> None:
    for shim in shims.SHIMS:
        if shim.stage == stage and shim.name != skip:
            shim.install()


def build_model():
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.1,
        bf16=True,
        params_dtype=torch.bfloat16,
        recompute_granularity="selective",
        recompute_modules=["layernorm"],
        bias_activation_fusion=True,
        gradient_accumulation_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(config, spec, 64, 8, position_embedding_type="rope").bfloat16()
    buckets = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, grad_reduce_in_fp32=True
    )
    return config, DistributedDataParallel(config, buckets, model)


def build_optimizer(model):
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
        clip_grad=1.0,
    )
    return get_megatron_optimizer(settings, [model])


def train(config, model, optimizer) -> float:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = model.no_sync
    tokens = torch.arange(8)[None]
    mask = torch.triu(torch.ones(8, 8, dtype=torch.bool), 1)[None, None]

    def forward(batches, chunk):
        next(batches)
        out = chunk(tokens, tokens, mask, labels=tokens)
        return out, lambda losses: (losses.float().mean(), {})

    model.zero_grad_buffer()
    optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(range(2)),
        model=model,
        num_microbatches=2,
        seq_length=8,
        micro_batch_size=1,
        forward_only=False,
    )
    ok, norm, _ = optimizer.step()
    assert ok
    assert norm > 0
    return float(norm)


def save_and_load(model, optimizer, folder: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.SimpleQueue()  # its own starts an interpreter
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}

    def state(model, optimizer, loading):
        weights = model.module.sharded_state_dict()
        kwargs = {"is_loading": loading, "metadata": metadata}
        return {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, **kwargs)}

    dist_checkpointing.save(state(model, optimizer, False), folder)
    _, fresh_model = build_model()
    fresh = build_optimizer(fresh_model)
    loaded = dist_checkpointing.load(state(fresh_model, fresh, True), folder)
    fresh_model.module.load_state_dict(loaded["model"])
    fresh.load_state_dict(loaded["optimizer"])
    group = fresh.param_groups[0]
    assert group["step"] == 1, group["step"]


def scale_fp16() -> None:
    """The loss scaler of fp16 training moves its state to the device when it is loaded."""
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    scaler = DynamicGradScaler(2.0**16, 1.0, 2.0, 0.5, 1000, 2)
    scaler.load_state_dict(scaler.state_dict())


def check_compiler() -> None:
    from megatron.core.fusions import fused_bias_swiglu

    assert not hasattr(fused_bias_swiglu.swiglu, "_torchdynamo_orig_callable")


def check_tracker() -> None:
    """Draws inside the tracker's context continue its own state and leave the outer one alone."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    outer = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with get_cuda_rng_tracker().fork():
            drawn.append(torch.rand(4))
    assert torch.equal(outer, torch.get_rng_state())
    assert not torch.equal(*drawn)


def check_split_sizes() -> None:
    """Sizes of the pieces that experts exchange are numbers: torch refuses tensors there."""
    from megatron.core.transformer.moe import token_dispatcher

    sizes = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([2, 3]), as_numpy=True)
    assert not isinstance(sizes, torch.Tensor)


def run(skip: str) -> None:
    install("before", skip)
    import megatron.core.models.gpt
    import megatron.core.optimizer  # noqa: F401
    from megatron.core import parallel_state, tensor_parallel

    install("after", skip)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config, model = build_model()
    optimizer = build_optimizer(model)
    train(config, model, optimizer)
    scale_fp16()
    check_compiler()
    check_tracker()
    check_split_sizes()
    with tempfile.TemporaryDirectory() as folder:
        save_and_load(model, optimizer, folder)


def in_child(skip: str) -> dict[str, object]:
    """What happened without the shim, from a forked process."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        error = ""
        try:
            run(skip)
        except BaseException as caught:
            error = f"{type(caught).__name__}: {caught}"
        report = {"name": skip, "error": error, "used": dict(redirects.used)}
        os.write(write, json.dumps(report).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        text = file.read()
    os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):  # without its shim, a helper outlives its rank
        os.killpg(pid, signal.SIGKILL)
    return json.loads(text or json.dumps({"name": skip, "error": "process died", "used": {}}))


if __name__ == "__main__":
    say = functools.partial(print, flush=True)
    for name in sys.argv[1:]:
        say(json.dumps(in_child(name)))
