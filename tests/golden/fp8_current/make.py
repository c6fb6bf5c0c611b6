"""Write what Transformer Engine's own reference quantizer makes of random and adversarial values.

The result, ``quantized.safetensors``, is what the emulation is compared with byte by byte. Run it
where Transformer Engine's Python files are, without its libraries or a GPU::

    pip install --no-deps --target te transformer-engine==2.20.2 && pip install pydantic
    NVTE_PROJECT_BUILDING=1 python -m tests.golden.fp8_current.make te
"""

import enum
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file
from torch import Tensor

OUT = Path(__file__).with_name("quantized.safetensors")
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def inputs() -> dict[str, Tensor]:
    """Matrices by name: random ones, and those at which quantizers go wrong."""
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(32, 48, generator=draw)
    spread = normal * torch.exp2(torch.randint(-40, 40, normal.shape, generator=draw).float())
    outlier, infinite, nan, single = (normal.clone() for _ in range(4))
    outlier[3, 5], nan[2, 2] = 1e30, torch.nan
    infinite[0, 0], infinite[1, 1] = torch.inf, -torch.inf
    single.zero_()[7, 7] = -3.0
    edges = torch.linspace(-448.0, 448.0, normal.numel()).view_as(normal)
    made = {
        "normal": normal,
        "gradient": 1e-9 * normal,
        "spread": spread,
        "outlier": outlier,
        "zeros": torch.zeros_like(normal),
        "negative_zeros": -torch.zeros_like(normal),
        "denormals": 1e-40 * normal,
        "least": torch.full_like(normal, 1e-45),
        "largest": torch.full_like(normal, torch.finfo(torch.float32).max),
        "infinite": infinite,
        "nan": nan,
        "single": single,
        "edges": edges,
    }
    return made | {f"{name}_bf16": x.bfloat16() for name, x in made.items()}


def reference() -> types.ModuleType:
    """Transformer Engine's module, with stand-ins for the parts that need its libraries."""
    import transformer_engine.common.recipe

    (root,) = sys.modules["transformer_engine"].__path__
    for name in ("pytorch", "pytorch.custom_recipes"):
        module = types.ModuleType(f"transformer_engine.{name}")
        module.__path__ = [f"{root}/{name.replace('.', '/')}"]
        sys.modules[module.__name__] = module
    library = MagicMock()
    names = "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1"
    library.DType = enum.IntEnum("DType", names)
    library.__spec__ = ModuleSpec("transformer_engine_torch", None)
    sys.modules["transformer_engine_torch"] = library
    import transformer_engine.pytorch.tensor  # noqa: F401
    from transformer_engine.pytorch.custom_recipes import reference_current_scaling

    return reference_current_scaling


def main() -> None:
    """Write the file; the argument is the folder that holds ``transformer_engine``."""
    sys.path.insert(0, sys.argv[1])
    quantizer = reference().CurrentScalingQuantizerRef
    tensors = {}
    for name, x in inputs().items():
        tensors[name] = x
        for short, dtype in DTYPES.items():
            for powers in (False, True):
                if powers and name.removesuffix("_bf16") in ("infinite", "nan"):
                    continue  # the reference itself stops there
                made = quantizer(dtype=dtype, pow_2_scales=powers, eps=0.0).quantize(x)
                key = f"{name}/{short}/{'power' if powers else 'plain'}"
                tensors[f"{key}/data"] = made.data.view(torch.uint8)
                tensors[f"{key}/inverse"] = made.scale.contiguous()
    save_file(tensors, OUT)


if __name__ == "__main__":
    main()
