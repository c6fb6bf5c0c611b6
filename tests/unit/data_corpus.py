"""Texts, records and configurations shared by the data tests."""

import os
import shutil
import sys
from pathlib import Path

import torch

from megatron_asvr.config.load import from_dict

# The one beside this Python, which belongs to its mpi4py, or else the machine's.
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")

TEXTS = [
    "USER: <image>\nWhat color is the circle? ASSISTANT: red",
    "Is there a blue triangle in the picture?  no\nyes",
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "What shape does the image contain? a rectangle, a circle",
] * 20


def turn(speaker, value):
    """One LLaVA turn."""
    return {"from": speaker, "value": value}


def ask(question, answer):
    """One LLaVA conversation of a question and its answer."""
    return [turn("human", question), turn("gpt", answer)]


def config(**changes):
    """A small configuration; ``section__key=value`` changes it."""
    tree = {
        "model": {
            "language": {"vocab_size": 512, "hidden_size": 32, "num_heads": 4},
            "vision": {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_heads": 4},
        },
        "data": {"template": "vicuna_short", "max_length": 256, "max_bad_share": 0.5},
        "train": {"global_batch": 4, "micro_batch": 1, "steps": 10},
    }
    for name, value in changes.items():
        node = tree
        *path, key = name.split("__")
        for part in path:
            node = node.setdefault(part, {})
        node[key] = value
    return from_dict(tree)


def first_views(decoder, encoded):
    """Pixels of the first view of each image, uint8 [I, C, H, W]."""
    return torch.stack([views[0] for views in decoder.views(encoded)])
