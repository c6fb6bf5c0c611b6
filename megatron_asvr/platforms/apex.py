"""Which ``apex`` is installed: NVIDIA's, an unrelated package of that name, or none.

The name ``apex`` on PyPI belongs to a toolkit for the Pyramid web framework. megatron-core decides
by ``import apex`` alone in several places (transformer/transformer_block.py:45, models/backends.py:
14 and models/gpt/gpt_layer_specs.py:59 of 0.16.1), so the presence of the wrong one misleads it.
"""

import importlib.util
import pathlib
import sys

FUSED = "fused_weight_gradient_mlp_cuda"


def detect() -> tuple[bool, str]:
    """Whether NVIDIA's apex can be imported, and what was found; imports nothing.

    NVIDIA's package is recognised by the two parts that megatron-core takes from it:
    ``apex.optimizers`` and ``apex.multi_tensor_apply``.
    """
    if "apex" in sys.modules and sys.modules["apex"] is None:
        return False, "blocked by megatron_asvr"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return False, "not installed (optional)"
    folders = [pathlib.Path(p) for p in spec.submodule_search_locations or ()]
    parts = ("optimizers", "multi_tensor_apply")
    if any(all((folder / part).is_dir() for part in parts) for folder in folders):
        parts = [name if there else f"no {name}" for name, there in compiled_parts().items()]
        return True, f"NVIDIA's apex in {folders[0]}, with {', '.join(parts)}"
    where = folders[0] if folders else spec.origin
    return False, (
        f"{where} is not NVIDIA's apex (PyPI's package of that name is a toolkit for the Pyramid "
        "web framework); it is ignored, `pip uninstall apex` removes it"
    )


def compiled_parts() -> dict[str, bool]:
    """Which of the extensions that megatron-core takes from NVIDIA's apex are there; imports none.

    ``amp_C`` scales and measures many tensors at once, where Transformer Engine does not.
    ``fused_weight_gradient_mlp_cuda`` adds the gradient of a weight inside the matrix product.
    Both are built only on request.
    """
    names = ("amp_C", FUSED)
    return {name: importlib.util.find_spec(name) is not None for name in names}


def block() -> None:
    """Let ``import apex`` fail from here on, as if it were not installed."""
    if sys.modules.get("apex") is None:
        sys.modules["apex"] = None  # type: ignore[assignment]
