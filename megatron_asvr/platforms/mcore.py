"""megatron-core, imported after this process was prepared for it.

Every module of ours that imports from ``megatron`` imports this one first; the order is kept by the
import sorting of ``pyproject.toml``.
"""

import warnings

from megatron_asvr.platforms.choose import select

# megatron-core calls collectives by names that newer versions of torch call deprecated.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
# It complains about the default of its own setting (0.16.1), which we leave alone.
warnings.filterwarnings("ignore", "full scope is deprecated", module=r"megatron\.core")
# 0.19.2 announces a module of its own, which we do not use, whenever it is imported.
warnings.filterwarnings("ignore", "MimoModelConfig is experimental")
# Experts are whole on their ranks, so it splits nothing there and says so for every one of them.
warnings.filterwarnings("ignore", "`sequence_parallel` is set to `True`, but tensor model parallel")
# Its optimizer asks shards, which are views, for a gradient that it sets itself.
warnings.filterwarnings(
    "ignore", r"The \.grad attribute of a Tensor", module=r"megatron\.core\.optimizer"
)

_platform, _ = select()
_platform.prepare()

import megatron.core  # noqa: E402

_platform.after_import()

version: str = megatron.core.__version__
