"""Where transformers 5 keeps in memory what a folder calls by the names of our tables."""

import re

from megatron_asvr.hf import tables
from megatron_asvr.hf.tables import Shape

_EXPERT = re.compile(r"(.*layers\.\d+\.)(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
_FUSED = {  # name of an expert's linear on disk: the tensor of all experts in memory
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj"),
    **dict.fromkeys(("down_proj", "w2"), "down_proj"),
}


def in_memory(shapes: dict[str, Shape], *, llava: bool) -> dict[str, Shape]:
    """Names and shapes of the state dictionary that a folder with ``shapes`` fills.

    The experts of a layer are one tensor, [experts, ...], with the gate above the up projection.

    Args:
        shapes: by the Hugging Face names of our tables.
        llava: of a whole model, not of a language model alone.

    """
    fused: dict[str, list[Shape]] = {}
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        place = _renamed(name, llava)
        if expert := _EXPERT.fullmatch(place):
            layer, _, linear = expert.groups()
            fused.setdefault(f"{layer}mlp.experts.{_FUSED[linear]}", []).append(shape)
        else:
            found[place.replace(".block_sparse_moe.gate.", ".mlp.gate.")] = shape
    for name, parts in fused.items():
        halves = 2 if name.endswith("gate_up_proj") else 1
        rows, width = parts[0]
        found[name] = (len(parts) // halves, halves * rows, width)
    return found


def _renamed(name: str, llava: bool) -> str:
    if not llava:
        return name.removeprefix(tables.HF_LM)
    name = name.replace("language_model.lm_head", "lm_head", 1)
    name = name.replace("language_model.model.", "model.language_model.", 1)
    name = name.replace(tables.HF_VISION, "model.vision_tower.", 1)
    if name == tables.NEWLINE:
        return f"model.{name}"
    return name.replace(tables.HF_PROJECTOR, f"model.{tables.HF_PROJECTOR}", 1)
