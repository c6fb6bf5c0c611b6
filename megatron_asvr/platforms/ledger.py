"""Where CUDA and the CPU take different paths: every row with its test and its probe.

A run on the CPU proves nothing about the other path but what the contract test says. The probe
(``launch/probes.py``, run by ``asvr gpu-smoke``) looks at the other path itself.
``tools/ledger.py`` writes the table into docs/gpu.md; ``tests/unit/test_ledger.py`` keeps platform
branches out of all other places.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One thing that is done differently.

    Attributes:
        name: of the thing.
        cuda: how CUDA does it.
        cpu: how the CPU does it.
        why: reason for the difference.
        places: where the code decides, below megatron_asvr: ``file::function``, ``file::class``, or
            a ``file`` for all of it.
        platform: members of ``base.Platform``, names of ``shims.SHIMS`` and ``shims.SAVINGS``.
        contract: test on the CPU, ``file::test``.
        probes: of ``launch/probes.py``; none stands in two rows.
        ran: when the probes last ran and on what.
    """

    name: str
    cuda: str
    cpu: str
    why: str
    places: tuple[str, ...] = ()
    platform: tuple[str, ...] = ()
    contract: str
    probes: tuple[str, ...]
    ran: str = "never"


ROWS = (
    Row(
        name="linear backend",
        cuda="Transformer Engine's layers in bf16; the local ones in fp32 or without it",
        cpu="local layers",
        why="Transformer Engine has no kernel for the CPU",
        places=(
            "precision/__init__.py::select_backend",
            "precision/__init__.py::_without_te",
            "precision/__init__.py::block_spec",
            "precision/te.py::<imports>",
        ),
        platform=("peak_flops",),
        contract="tests/unit/test_language.py::test_backend_choice_gives_its_reason",
        probes=("te_linear", "gemm_rate"),
    ),
    Row(
        name="gradients of weights",
        cuda="added up inside their product, where apex's kernel is there",
        cpu="added up inside it by MKL or torch, all linears multiplying our way",
        why="megatron-core's own layers want an extension of apex",
        places=(
            "precision/__init__.py::fuse_gradients",
            "model/asvr.py::build_chunks",
            "precision/products.py::_stored",
            "precision/matmul.py::add_product",
        ),
        contract="tests/unit/test_nodes.py::test_products_add_to_the_buffers_of_their_weights",
        probes=("fused_gradient",),
    ),
    Row(
        name="norm",
        cuda="inside Transformer Engine's linear, or torch's kernel",
        cpu="one node of the graph by a kernel, or without kernels in fp32; else torch's",
        why="torch has only single operations for the CPU",
        places=("precision/norm.py::forward",),
        contract="tests/unit/test_norm.py::test_output_and_gradients_are_those_of_torch",
        probes=("norm",),
    ),
    Row(
        name="inputs of linears",
        cuda="kept for the backward pass",
        cpu="made again there from what is kept anyway, where one pass over memory does it",
        why="compilers know no such hooks",
        places=("precision/remake.py::remember",),
        contract="tests/unit/test_nodes.py"
        "::test_a_linear_behind_a_norm_keeps_nothing_and_computes_the_same_bits",
        probes=("remade_input",),
    ),
    Row(
        name="attention",
        cuda="documents end to end, fused (Transformer Engine); questions repeat their image",
        cpu="documents one by one; a dense mask where questions share their image",
        why="the fused kernels know documents, but no mask between questions",
        places=(
            "precision/__init__.py::check_attention",
            "precision/__init__.py::attention_rule",
            "train/assemble.py::shares_images",
        ),
        contract="tests/unit/test_language.py::test_dense_attention_is_softmax_attention",
        probes=("attention", "te_attention"),
    ),
    Row(
        name="FP8",
        cuda="Transformer Engine's recipes, by compute capability and CUDA",
        cpu="emulated, or refused",
        why="8-bit products need tensor cores",
        places=(
            "config/precision.py::check_precision",
            "precision/__init__.py::select_fp8",
            "precision/__init__.py::megatron_settings",
            "model/linears.py::in_8_bits",
        ),
        platform=("compute_capability", "cuda_version"),
        contract="tests/unit/test_fp8_choice.py"
        "::test_8_bits_are_refused_where_nothing_can_do_them_and_emulated_where_told",
        probes=("fp8_linear",),
    ),
    Row(
        name="fused losses",
        cuda="torch's kernels on chunks of logits",
        cpu="the same code; rounding differs",
        why="no branch of ours, other kernels",
        contract="tests/unit/test_output_loss.py"
        "::test_losses_and_gradients_are_those_of_the_plain_form",
        probes=("loss",),
    ),
    Row(
        name="optimizer",
        cuda="FusedAdam of Transformer Engine or apex, else torch's",
        cpu="a FusedAdam of our own with the same state; clips in place, copies no fp32 weight",
        why="megatron-core looks for an extension",
        platform=("fused_adam", "in_place_updates"),
        contract="tests/unit/test_platforms_adam.py::test_the_steps_are_torchs",
        probes=("adam",),
    ),
    Row(
        name="collectives",
        cuda="NCCL, group bound to the rank's device; CUDA tensors only",
        cpu="gloo; CPU tensors only; a group of one rank copies nothing",
        why="each backend has its device",
        places=(
            "parallel/collectives.py::<module>",
            "parallel/collectives.py::_check",
            "parallel/flight.py::_calls",
            "launch/rank.py::leave_group",
            "launch/preflight.py::all_reduce_gb_s",
            "launch/smoke.py::missing",
            "launch/probes_of_runs.py",
        ),
        platform=(
            *("name", "backend", "device", "set_device", "group_device", "num_gpus", "link_gb_s"),
            "lone_collectives",
        ),
        contract="tests/unit/test_contracts.py::test_nccl_gets_no_tensor_of_the_cpu",
        probes=("all_reduce", "tensor_certificate", "all_reduce_nodes"),
    ),
    Row(
        name="p2p",
        cuda="batched sends of NCCL without virtual stages, single ones with them",
        cpu="gloo's",
        why="as above; batched ones are wrong under gloo with virtual stages",
        platform=("type_names", "split_sizes"),
        contract="tests/world/test_language_layouts.py::test_layouts_agree_with_one_rank",
        probes=("pipeline_certificate",),
    ),
    Row(
        name="RNG",
        cuda="a generator on the device; nothing random is in a step",
        cpu="torch's generator",
        why="megatron-core forks the generator of CUDA",
        places=("model/megatron_config.py::transformer_config",),
        platform=("generator", "tracker_state"),
        contract="tests/world/test_language_layouts.py::test_weights_do_not_depend_on_the_layout",
        probes=("seeded",),
    ),
    Row(
        name="streams",
        cuda="kernels are queued, and timed by events; host copies go through pinned memory",
        cpu="operators run one after another",
        why="a device works beside its host",
        platform=("synchronize", "stream", "bring", "mark", "seconds", "streams", "moves"),
        contract="tests/unit/test_hidden_syncs.py::test_a_step_waits_for_the_device_at_known_places",
        probes=("pinned_copy",),
    ),
    Row(
        name="compile",
        cuda="megatron-core's jit_fuser, and with train.compile layers of ours",
        cpu="switched off",
        why="no compiler and no triton on the CPU",
        platform=("no_compiler", "no_triton"),
        contract="tests/world/test_shims.py::test_with_all_of_them_it_works",
        probes=("compiled",),
    ),
    Row(
        name="CUDA graphs",
        cuda="torch's, of a frozen encoder, with train.cuda_graphs",
        cpu="none; the log says so",
        why="only a GPU has a queue to record",
        places=("train/start.py::idle_settings",),
        contract="tests/unit/test_vision.py::test_a_graph_may_write_over_what_it_gave_before",
        probes=("graphed",),
    ),
    Row(
        name="recomputation",
        cuda="megatron-core's checkpoint, with the FP8 state of Transformer Engine",
        cpu="the same, without that state",
        why="its import asks for Transformer Engine",
        platform=("recompute",),
        contract="tests/unit/test_recompute.py::test_only_what_was_asked_for_is_computed_again",
        probes=("recomputed",),
    ),
    Row(
        name="memory",
        cuda="torch's allocator on the device",
        cpu="the process's resident set",
        why="what can run out differs; the plan counts both ways",
        places=("planner/memory.py", "planner/rehearsal.py"),
        platform=("peak_memory_bytes", "release_memory", "current_device", "factories"),
        contract="tests/unit/test_platforms.py::TestCpu::test_peak_memory_grows_with_use",
        probes=("memory",),
    ),
    Row(
        name="async save",
        cuda="a copy from the device, then a thread writes",
        cpu="a copy of the memory, then a thread writes",
        why="the device's memory changes in the next step",
        contract="tests/unit/test_contracts.py::test_what_is_saved_in_the_background_may_change",
        probes=("saved_copy", "write_speed"),
    ),
    Row(
        name="image decode",
        cuda="DALI's mixed decoder, in the order of torch's stream",
        cpu="DALI on the CPU",
        why="nvJPEG decodes with rounding of its own: codes and features are cached by device",
        places=(
            "data/dali/pipeline.py::_build",
            "train/fit.py::fit_tokenizer",
            "train/assemble.py::code_cache",
            "train/assemble.py::open_features",
        ),
        contract="tests/unit/test_data_images.py::test_dali_agrees_with_pil",
        probes=("decode", "token_flips"),
    ),
    Row(
        name="process of a rank",
        cuda="a process of its own",
        cpu="forked from one that has imported everything",
        why="a CUDA context does not survive a fork",
        places=("launch/local.py::run_ranks",),
        platform=("supports_fork", "prepare", "after_import", "per_rank"),
        contract="tests/unit/test_platforms.py::TestShims::test_inert_with_cuda",
        probes=("import_megatron",),
    ),
    Row(
        name="dtype of answers",
        cuda="bf16",
        cpu="fp32",
        why="bf16 is slow on most CPUs",
        places=("hf/suite/answer.py::answer_dtype",),
        contract="tests/unit/test_contracts.py::test_answers_are_of_the_platforms_type",
        probes=("bf16_product",),
    ),
)
