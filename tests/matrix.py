"""The layouts and options that must not change a run, and real data to show it on.

``rows`` covers every pair of (layout, option value) and of two option values. The one process that
everything is compared with always runs unpacked with micro-batches of one sample and without
recomputation, so packing, micro-batching and recomputation are compared as well.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_asvr.config.schema import Config
from megatron_asvr.data.text import TextTokenizer
from tests.run_cases import config, tokenizer

ALL = ["vision_encoder", "projector", "language_model", "visual_head"]
BATCH = 12  # samples of a global batch: the whole data set, in another order every step

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp2_sp": {"tp": 2, "sp": True},
    "pp2": {"pp": 2},
    "pp4": {"pp": 4},
    "pp2_vpp2": {"pp": 2, "vpp": 2},
    "cp2": {"cp": 2},
    "dp2": {"dp": 2},
    "tp2_pp2": {"tp": 2, "pp": 2},
    "tp2_sp_cp2": {"tp": 2, "sp": True, "cp": 2},
    "pp2_dp2": {"pp": 2, "dp": 2},
    "tp2_pp2_dp2_sp": {"tp": 2, "pp": 2, "dp": 2, "sp": True},
    "ep2": {"ep": 2, "dp": 2},
}

# The first value of each is the default.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "mix": ("mixed", "one_image", "no_captions"),
    "packing": (False, True),
    "micro_batch": (1, 3),
    "target_shift": (0, 1),
    "model": ("trained", "tied", "stage1"),
    "recompute": ("none", "full", "selective"),
}
DEFAULT = {name: values[0] for name, values in OPTIONS.items()}

MIXES = {
    # One of twelve: text, image with caption, image without, several images, several questions.
    "mixed": "t c n m q t t n c t m t",
    "one_image": "t t t m t t t t t t t t",
    "no_captions": "n n n n n n n n n n n n",
    "no_images": "t t t t t t t t t t t t",
}


@dataclass(frozen=True)
class Case:
    """A row of the matrix: a layout and a value of every option."""

    layout: str
    options: tuple[tuple[str, Any], ...]

    @property
    def reference(self) -> tuple[str, ...]:
        """What the one process must have in common with it."""
        chosen = dict(self.options)
        experts = "experts" if "ep" in LAYOUTS[self.layout] else "dense"
        return chosen["mix"], chosen["target_shift"], chosen["model"], experts


def rows() -> list[Case]:
    """Every layout with the defaults, then greedily whatever still misses a pair."""
    names = ("layout", *OPTIONS)
    values = {"layout": tuple(LAYOUTS), **OPTIONS}
    missing = {
        frozenset([(a, x), (b, y)])
        for a, b in itertools.combinations(names, 2)
        for x in values[a]
        for y in values[b]
    }
    found = []

    def take(row: dict[str, Any]) -> None:
        missing.difference_update(
            frozenset(pair) for pair in itertools.combinations(row.items(), 2)
        )
        options = tuple((name, row[name]) for name in OPTIONS)
        found.append(Case(row["layout"], options))

    for layout in LAYOUTS:
        take({"layout": layout, **DEFAULT})
    while missing:
        first = min(missing, key=lambda pair: sorted(map(repr, pair)))
        row = dict(first)
        for name in names:
            if name not in row:
                row[name] = max(
                    values[name],
                    key=lambda x, name=name: sum(
                        frozenset([(name, x), other]) in missing for other in row.items()
                    ),
                )
        take(row)
    return found


def make_files(folder: Path) -> Path:
    """Images, a text tokenizer, a visual tokenizer and one JSON file for every mix."""
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(24):
        pixels = generator.integers(0, 255, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    for mix, kinds in MIXES.items():
        records = [_record(place, kind) for place, kind in enumerate(kinds.split())]
        (folder / f"{mix}.json").write_text(json.dumps(records))
    texts = ["USER: What is seen here and there? ASSISTANT: a red box and a blue ball yes no"] * 40
    TextTokenizer.train(texts, folder / "text.model", vocab_size=300)
    tokenizer(config().model.vision).save(folder / "visual")
    return folder


def _record(place: int, kind: str) -> dict[str, Any]:
    def talk(question: str, answer: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]

    image, more = f"{place}.png", [f"{place}.png", f"{place + 12}.png", f"{(place + 5) % 12}.png"]
    answer = "a red box and a blue ball " * (1 + place % 4)
    bodies = {
        "t": {"conversations": talk("What is seen here?", answer)},
        "c": {"image": image, "conversations": talk("<image>\nWhat is seen?", answer)},
        "n": {"image": image, "conversations": [{"from": "human", "value": "<image>"}]},
        "m": {"image": more, "conversations": talk("<image><image>\nand <image>?", answer)},
        "q": {"image": image, "conversations": [talk("red?", "yes"), talk("blue?", "no box")]},
    }
    return {"id": f"{kind}{place}", **bodies[kind]}


def case_config(
    files: Path, layout: dict[str, Any], options: dict[str, Any], **more: Any
) -> Config:
    """The run of a case.

    Args:
        files: from ``make_files``.
        layout: parallel degrees; dp is the rest of the world.
        options: a value for every name of ``OPTIONS``.
        more: other settings, ``section__name=value``.
    """
    experts = (
        {
            "model__language__family": "mixtral",
            "model__language__num_experts": 4,
            "model__language__expert_ffn_hidden_size": 24,
            "model__language__experts_per_token": 2,
        }
        if options.get("kind") == "experts"
        else {}
    )
    trainable = {"stage1": ["projector", "visual_head"]}.get(options["model"], ALL)
    return config(
        **{
            "model__language__num_layers": 4,
            # Key biases have no gradient but rounding errors, which grow with those around them.
            "model__vision__init_std": 0.02,
            "model__language__tied_embeddings": options["model"] == "tied",
            "model__language__vocab_size": 300,
            "model__text_tokenizer": str(files / "text.model"),
            "model__visual_tokenizer": str(files / "visual"),
            "data__train": [
                {"path": str(files / f"{options['mix']}.json"), "images": str(files / "images")}
            ],
            "data__template": "vicuna_short",
            "data__max_length": 96,
            "data__cache_dir": str(files / "codes"),
            "data__packing": options["packing"],
            "loss__target_shift": options["target_shift"],
            "train__global_batch": BATCH,
            "train__micro_batch": options["micro_batch"],
            "train__trainable": trainable,
            "train__optim": {"lr": 1e-3, "warmup_fraction": 0.2, "weight_decay": 0.1},
            "train__recompute": options["recompute"],
            "train__recompute_visual_head": options["recompute"] == "full",
            **{f"parallel__{name}": value for name, value in layout.items() if name != "dp"},
            **experts,
            **more,
        }
    )
