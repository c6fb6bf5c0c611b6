"""A small SigLIP, trained from nothing on what the training questions tell about the images.

The sigmoid loss of SigLIP over all short captions ("a red circle", "a circle", "a red shape"): for
each image a caption is true, false, or unknown (then it does not count). The result is a stock
Hugging Face ``SiglipVisionModel`` folder, which is what every later step of the quick start loads,
as it would load Google's weights.

The language model reads ``hidden_states[-2]``, one layer below what the loss sees, so that is the
layer whose quality is measured, on held-out images (``quality.json`` beside the weights).

Every step is a pure function of (seed, step), and the state is saved now and then: a training that
was interrupted continues, and ends with the same weights.

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
THREADS = 1  # the matrices are tiny: a second thread gains little, and loses on a busy machine
SAVE_EVERY_STEPS = 100
STATE_FILE = ".training.pt"
RIDGE = 1e-4  # of the linear probe; it only keeps the equations solvable
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


class Contrast(nn.Module):
    """The two encoders, and the learned scale and bias of the sigmoid loss."""

    def __init__(self) -> None:
        super().__init__()
        self.images = SiglipEncoder(VISION)
        self.captions = CaptionEncoder(VISION.hidden_size)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-3.0))
        initialise(self.images)

    def forward(self, pixels_ICHW: Tensor, truths: Tensor) -> Tensor:
        """Loss of all known pairs, summed over captions and averaged over images.

        Args:
            pixels_ICHW: normalised images.
            truths: TRUE, FALSE or UNKNOWN, [I, number of captions].
        """
        similar = pool(self.images, pixels_ICHW) @ self.captions().T
        logits = similar * self.log_scale.exp() + self.bias
        return -(F.logsigmoid(truths * logits) * (truths != UNKNOWN)).sum() / len(truths)


def train(data: Path, out: Path, *, steps: int = STEPS, say: Callable[[str], None] = print) -> None:
    """Train, measure and write the folder; an interrupted call is continued by the next.

    Args:
        data: folder of examples.quickstart.data.
        out: Hugging Face folder to write; the state of an unfinished training lies in it.
        steps: optimizer steps.
        say: prints a progress line.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    facts = read_facts(data / "facts.json")
    pixels_ICHW = read_pixels([data / "images" / name for name, _ in facts])
    truths = torch.tensor([[truth(f, c) for c in captions()] for _, f in facts])
    model = Contrast()
    optimizer = torch.optim.AdamW(
        model.parameters(), LR, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    first = load_state(out / STATE_FILE, model, optimizer)
    started = time.monotonic()
    for step in range(first, steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
        chosen, rng = sample(len(facts), step)
        parts = [augment(pixels_ICHW[part], rng) for part in chosen.chunk(8)]
        loss = model(torch.cat(parts), truths[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if done % SAVE_EVERY_STEPS == 0 or done == steps:
            save_state(out / STATE_FILE, done, model, optimizer)
            left = (time.monotonic() - started) * (steps - done) / (done - first)
            say(f"encoder step {done}/{steps} loss {loss.item():.4f} ETA {left:.0f} s")
    measured = quality(model, data)
    say(f"on held-out images: {json.dumps(measured)}")
    write_folder(model.images, measured, out)
    torch.set_num_threads(threads)


def learning_rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine to zero."""
    return LR * min(1, (step + 1) / WARMUP_STEPS) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def sample(num_images: int, step: int) -> tuple[Tensor, torch.Generator]:
    """Images of a step, and the generator of its augmentation."""
    epoch, place = divmod(step, max(1, num_images // BATCH))
    shuffler = torch.Generator().manual_seed(SEED + epoch)
    order = torch.randperm(num_images, generator=shuffler)
    rng = torch.Generator().manual_seed(1_000_000 * (SEED + 1) + step)
    return order[place * BATCH : (place + 1) * BATCH], rng


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


@torch.no_grad()
def quality(model: Contrast, data: Path) -> dict[str, float]:
    """Accuracy of colour and shape on the held-out images of val.json.

    ``zero_shot``: the best of the captions that name only a colour, or only a shape. ``probe``: a
    linear map from mean and maximum over the patches of ``hidden_states[-2]``, solved on the
    training images.
    """
    seen, new = read_facts(data / "facts.json"), read_facts(data / "val_facts.json")
    seen_x, _ = features(model.images, data, seen)
    new_x, new_pooled = features(model.images, data, new)
    similar = new_pooled @ model.captions().T
    result = {}
    for kind, names in (("colour", COLOURS), ("shape", SHAPES)):
        alone = [captions().index((n, None) if kind == "colour" else (None, n)) for n in names]
        wanted_seen, wanted = (
            torch.tensor([names.index(v) if (v := getattr(f, kind)) else -1 for _, f in part])
            for part in (seen, new)
        )
        guess = similar[:, alone].argmax(-1)
        result[f"zero_shot_{kind}"] = accuracy(guess, wanted)
        known = wanted_seen >= 0
        weights = solve_probe(seen_x[known], F.one_hot(wanted_seen[known], len(names)))
        result[f"probe_{kind}"] = accuracy((new_x @ weights).argmax(-1), wanted)
    return result


def features(
    encoder: SiglipEncoder, data: Path, facts: Sequence[tuple[str, Facts]]
) -> tuple[Tensor, Tensor]:
    """Inputs of the probe [I, 2F + 1] from ``hidden_states[-2]``, and pooled vectors [I, F]."""
    inputs, pooled = [], []
    for part in read_pixels([data / "images" / name for name, _ in facts]).split(256):
        x_INF = encoder.embeddings(normalise(part))
        for layer in encoder.encoder.layers[:-1]:
            x_INF = layer(x_INF)
        inputs.append(torch.cat([x_INF.mean(1), x_INF.amax(1), torch.ones(len(x_INF), 1)], 1))
        pooled.append(pool(encoder, normalise(part)))
    return torch.cat(inputs).double(), torch.cat(pooled)


def solve_probe(x: Tensor, wanted: Tensor) -> Tensor:
    """Weights of the ridge regression from ``x`` to one-hot rows, fp64."""
    ridge = RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(x.T @ x + ridge, x.T @ wanted.to(x.dtype))


def accuracy(guess: Tensor, wanted: Tensor) -> float:
    """Share of right guesses among the images whose label is known (not -1)."""
    known = wanted >= 0
    return round((guess == wanted)[known].double().mean().item(), 4)


def save_state(path: Path, step: int, model: Contrast, optimizer: torch.optim.Optimizer) -> None:
    """Write the state after ``step`` steps: the old file or the new one survives a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, part)
    os.replace(part, path)


def load_state(path: Path, model: Contrast, optimizer: torch.optim.Optimizer) -> int:
    """Steps done in the training that ``path`` continues; 0 where there is none."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def write_folder(encoder: SiglipEncoder, measured: dict[str, float], out: Path) -> None:
    """Write a stock ``SiglipVisionModel`` folder and its quality, whole or not at all."""
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
    (part / "quality.json").write_text(json.dumps(measured) + "\n", encoding="utf-8")
    state = encoder.state_dict()
    tensors = {f"vision_model.{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(out, ignore_errors=True)
    os.replace(part, out)
