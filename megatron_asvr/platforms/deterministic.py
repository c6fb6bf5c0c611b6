"""The switches that make GPU libraries give the same bits every time: ``train.deterministic``.

Without them Transformer Engine's attention, cuBLAS, NCCL's in-switch sums and some of torch's
operators may add in another order from one run to the next. The variables are read when a library
is first used, so a rank sets them before it touches its device.
"""

import os

import torch

from megatron_asvr.errors import ConfigError

# Every variable: what it is set to, and what a user may have set it to instead.
VARIABLES = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0", ("0",)),
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", (":4096:8", ":16:8")),
    "NCCL_ALGO": ("Ring", ("Ring", "CollnetDirect", "CollnetChain", "^NVLS")),
    "NCCL_NVLS_ENABLE": ("0", ("0",)),
}


def check_environment() -> None:
    """Return when no variable contradicts.

    Raises:
        ConfigError: naming every one that does.
    """
    wrong = [
        f"{name}={os.environ[name]!r} (allowed: {', '.join(allowed)})"
        for name, (_, allowed) in VARIABLES.items()
        if os.environ.get(name, allowed[0]) not in allowed
    ]
    if wrong:
        raise ConfigError(
            f"train.deterministic=true, but the environment says {'; '.join(wrong)}; unset "
            "it, or train without train.deterministic"
        )


def switch_on() -> None:
    """Set everything for this process. torch then refuses operators that have no such form.

    Raises:
        ConfigError: the environment contradicts.
    """
    check_environment()
    for name, (value, _) in VARIABLES.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
