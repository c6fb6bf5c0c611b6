"""The README.md of an exported folder: facts that the export itself knows, nothing else."""

import torch

from megatron_asvr.config.schema import Config
from megatron_asvr.hf.stock import TEXT_ARCHITECTURES, WHOLE

_FIT = {
    "pad": "padded to a square with grey (127) first, then resized",
    "square": "resized to a square",
}
_LOAD_WHOLE = """from transformers import AutoProcessor, {name}

model = {name}.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)"""
_LOAD_TEXT = """from transformers import AutoModelForCausalLM, {loader}

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = {loader}.from_pretrained(folder)"""


def model_card(
    config: Config, *, kind: str, dtype: torch.dtype, has_head: bool, loader: str
) -> str:
    """Markdown text that says what is in the folder and how to load it.

    Args:
        config: the run that made the weights.
        kind: "llava" or "text".
        dtype: of the weights on disk.
        has_head: whether the visual head's file is there.
        loader: class of transformers that loads the tokenizer.
    """
    language, vision = config.model.language, config.model.vision
    llava = kind == "llava"
    resolution = config.model.resolution
    whole = WHOLE[resolution.mode != "single"]
    name = whole if llava else TEXT_ARCHITECTURES[language.family]
    facts = [
        f"language model: {language.family}, {language.num_layers} layers, width "
        f"{language.hidden_size}, vocabulary {language.vocab_size}",
        f"weights: {str(dtype).removeprefix('torch.')}",
    ]
    if llava:
        facts += [
            f"vision encoder: SigLIP, {vision.num_layers} layers, width {vision.hidden_size}, "
            f"feature layer {vision.feature_layer}",
            f"images: {_FIT[config.data.image_fit]} to {vision.image_size} px (bicubic), "
            f"{vision.num_patches} tokens each",
        ]
        if resolution.mode == "anyres":
            grids = ", ".join(f"{rows} x {columns}" for rows, columns in resolution.grids)
            facts.append(f"and the tiles of the best of these grids (rows x columns): {grids}")
    if has_head:
        facts.append(
            "`visual_head.safetensors`, `visual_head_config.json`: the head that predicted image "
            "codes in training; generation does not use it"
        )
    tag = "image-text-to-text" if llava else "text-generation"
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            f"pipeline_tag: {tag}",
            "---",
            f"# {name}",
            "",
            "Trained and exported with megatron_asvr. It needs no code but transformers.",
            "",
            *(f"- {fact}" for fact in facts),
            "",
            "```python",
            _LOAD_WHOLE.format(name=name) if llava else _LOAD_TEXT.format(loader=loader),
            "```",
            "",
            "Licence and limits follow from the weights and data it was trained from.",
            "",
        ]
    )
