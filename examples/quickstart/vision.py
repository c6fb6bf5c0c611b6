"""A small SigLIP, trained from nothing on what the training questions tell about the images.

The sigmoid loss of SigLIP over all short captions ("a red circle", "a circle", "a red shape"): for
each image a caption is true, false, or unknown (then it does not count). The result is a stock
Hugging Face ``SiglipVisionModel`` folder, which is what every later step of the quick start loads,
as it would load Google's weights.

Source of the loss: arXiv 2303.15343 (sigmoid loss, learned temperature and bias).
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from examples.quickstart.data import COLOURS, SHAPES, Facts, read_facts
from megatron_asvr.config.schema import VisionConfig
from megatron_asvr.model.vision import SiglipEncoder

VISION = VisionConfig(
    hidden_size=64,
    num_layers=4,
    num_heads=2,
    ffn_hidden_size=128,
    image_size=64,
    patch_size=8,
    feature_layer=-1,  # all layers train; the language model reads the last but one
)
STEPS = 1000
BATCH = 64
LR = 3e-3
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.05
SHIFT = 8  # pixels that an image is moved by at most
SEED = 0
SAY_EVERY_STEPS = 100
UNKNOWN, FALSE, TRUE = 0, -1, 1

Caption = tuple[str | None, str | None]  # colour, shape


def captions() -> list[Caption]:
    """Every caption that names a colour, a shape or both."""
    return [(c, s) for c in (*COLOURS, None) for s in (*SHAPES, None) if c or s]


def truth(facts: Facts, caption: Caption) -> int:
    """Whether a caption is TRUE, FALSE or UNKNOWN of an image, from its facts alone."""
    named = [word for word in caption if word]
    if any(word in facts.absent for word in named):
        return FALSE
    return TRUE if all(word in (facts.colour, facts.shape) for word in named) else UNKNOWN


class CaptionEncoder(nn.Module):
    """A bag of words: enough for captions of two words."""

    def __init__(self, width: int) -> None:
        super().__init__()
        words = [*COLOURS, *SHAPES, ""]
        place = {word: i for i, word in enumerate(words)}
        ids = [[place[c or ""], place[s or ""]] for c, s in captions()]
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.words = nn.Embedding(len(words), width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self) -> Tensor:
        """Unit vectors of all captions, [number of captions, width]."""
        return F.normalize(self.mlp(self.words(self.ids).mean(1)), dim=-1)


def train(data: Path, out: Path, *, steps: int = STEPS, say: Callable[[str], None] = print) -> None:
    """Train and write the folder; an interrupted call leaves nothing and starts again.

    Args:
        data: folder of examples.quickstart.data.
        out: Hugging Face folder to write.
        steps: optimizer steps.
        say: prints a progress line.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices; and the same sums on every machine
    torch.manual_seed(SEED)
    facts = read_facts(data / "facts.json")
    pixels_ICHW = read_pixels([data / "images" / name for name, _ in facts])
    labels = torch.tensor([[truth(f, c) for c in captions()] for _, f in facts])
    encoder, text = SiglipEncoder(VISION), CaptionEncoder(VISION.hidden_size)
    initialise(encoder)
    scale, bias = nn.Parameter(torch.tensor(math.log(10.0))), nn.Parameter(torch.tensor(-3.0))
    parameters = [*encoder.parameters(), *text.parameters(), scale, bias]
    optimizer = torch.optim.AdamW(parameters, LR, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1, (s + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * s / steps)),
    )
    generator = torch.Generator().manual_seed(SEED)
    order = torch.empty(0, dtype=torch.long)
    started = time.monotonic()
    for step in range(1, steps + 1):
        if len(order) < BATCH:
            order = torch.randperm(len(facts), generator=generator)
        chosen, order = order[:BATCH], order[BATCH:]
        parts = [augment(pixels_ICHW[part], generator) for part in chosen.chunk(8)]
        logits = pool(encoder, torch.cat(parts)) @ text().T * scale.exp() + bias
        wanted = labels[chosen]
        loss = -(F.logsigmoid(wanted * logits) * (wanted != UNKNOWN)).sum() / len(chosen)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % SAY_EVERY_STEPS == 0 or step == steps:
            left = (time.monotonic() - started) * (steps - step) / step
            say(f"encoder step {step}/{steps} loss {loss.item():.4f} ETA {left:.0f} s")
    write_folder(encoder, out)
    torch.set_num_threads(threads)


def pool(encoder: SiglipEncoder, pixels_ICHW: Tensor) -> Tensor:
    """Unit vectors of images, [I, width]: the mean over patches of the last layer."""
    return F.normalize(encoder.post_layernorm(encoder(pixels_ICHW)).mean(1), dim=-1)


def augment(pixels_ICHW: Tensor, generator: torch.Generator) -> Tensor:
    """Normalised pixels, all moved by one random offset and perhaps mirrored.

    The border shows the image's median colour, which in these images is the background.
    """
    pixels_ICHW = normalise(pixels_ICHW)
    side = pixels_ICHW.shape[-1]
    background = pixels_ICHW.flatten(2).median(-1).values[:, :, None, None]
    canvas = background.repeat(1, 1, side + 2 * SHIFT, side + 2 * SHIFT)
    canvas[:, :, SHIFT:-SHIFT, SHIFT:-SHIFT] = pixels_ICHW
    x, y = torch.randint(0, 2 * SHIFT + 1, (2,), generator=generator).tolist()
    moved = canvas[:, :, y : y + side, x : x + side]
    return moved.flip(3) if torch.rand((), generator=generator) < 0.5 else moved


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels as SigLIP wants them, in [-1, 1]."""
    return (pixels.float() - 127.5) / 127.5


def read_pixels(paths: Sequence[Path]) -> Tensor:
    """uint8 pixels [I, C, H, W]."""
    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def initialise(encoder: SiglipEncoder) -> None:
    """Draw the encoder's weights: Xavier for matrices, small positions, zero biases."""
    for name, parameter in encoder.named_parameters():
        if "position" in name:
            nn.init.normal_(parameter, std=0.02)
        elif parameter.dim() >= 2:
            nn.init.xavier_uniform_(parameter.data.flatten(1))
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def write_folder(encoder: SiglipEncoder, out: Path) -> None:
    """Write a stock ``SiglipVisionModel`` folder, whole or not at all."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    config = {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": VISION.hidden_size,
        "num_hidden_layers": VISION.num_layers,
        "num_attention_heads": VISION.num_heads,
        "intermediate_size": VISION.ffn_hidden_size,
        "image_size": VISION.image_size,
        "patch_size": VISION.patch_size,
        "num_channels": 3,
        "layer_norm_eps": VISION.norm_eps,
        "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": False,
    }
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = encoder.state_dict()
    tensors = {f"vision_model.{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)
