"""Write the files of this folder from the full output of the official code."""

import json
import pathlib
import re
import sys

from safetensors.torch import load_file, save_file

from tests.oracle import FOLDER, MAX_FULL, sketch

KEPT = (
    "tokenizer_model_max_length",
    "loss",
    "loss_text",
    "loss_vision",
    "n_text_targets",
    "padded_len",
    "vision_ce_per_depth",
    "grad_norms",
    "fixed_loss",
    "fixed_loss_vision",
    "grad_norms_fixed",
    "error",
)
INPUTS = ("input_ids", "labels", "attention_mask", "images")
UNUSED_LAYER = re.compile(r"(tower|tok_siglip)\.encoder\.layers\.5\.")


def main(source: pathlib.Path) -> None:
    expected = {}
    for case, values in json.loads((source / "expected.json").read_text()).items():
        short = {name.split(" (")[0]: value for name, value in values.items()}
        expected[case] = {name: short[name] for name in KEPT if name in short}
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    (FOLDER / "config.json").write_text((source / "config.json").read_text() + "\n")

    weights = load_file(source / "weights.safetensors")
    weights = {name: x for name, x in weights.items() if not UNUSED_LAYER.match(name)}
    save_file(weights, FOLDER / "weights.safetensors")

    cases = {}
    for file in sorted(source.glob("case_*.safetensors")):
        case, tensors = file.stem.removeprefix("case_"), load_file(file)
        cases |= {f"{case}.{n}": tensors[f"input.{n}"] for n in INPUTS if f"input.{n}" in tensors}
        if "codes" in tensors:
            cases[f"{case}.codes"] = tensors["codes"]
    save_file(cases, FOLDER / "cases.safetensors")

    gradients = {}
    for file in sorted(source.glob("grads_*.safetensors")):
        case = file.stem.removeprefix("grads_")
        for name, gradient in load_file(file).items():
            if gradient.numel() <= MAX_FULL:
                gradients[f"{case}.{name}"] = gradient
            else:
                gradients[f"sketch.{case}.{name}"] = sketch(gradient).float()
    save_file(gradients, FOLDER / "gradients.safetensors")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
