"""The synthetic model of the conversion benchmark: as a Hugging Face folder, and as a run."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process)

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_asvr.checkpoint import write
from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.checkpoint.frozen import write_frozen
from megatron_asvr.checkpoint.meta import FileFacts, Meta, ResumeState, write_meta
from megatron_asvr.checkpoint.state import Part
from megatron_asvr.config.load import load, override, to_dict
from megatron_asvr.config.schema import LanguageConfig, ModelConfig, VisionConfig
from megatron_asvr.data.text import TextTokenizer
from megatron_asvr.hf import run as conversions
from megatron_asvr.hf import stock, tables
from megatron_asvr.hf.shards import ShardWriter

DTYPE = torch.bfloat16
SHARD_BYTES = 2 * 10**9
BLOCK = 1 << 22  # numbers
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE_ID = 4
ENCODER = "vision_encoder"


def prepare() -> None:
    """Import what conversions import on the way, so that it is not measured."""
    assert conversions.export_run
    for name in ("AutoConfig", "LlavaForConditionalGeneration", "LlavaProcessor", "AutoTokenizer"):
        getattr(stock.transformers(), name)


def model_of(gb: float) -> ModelConfig:
    """A LLaVA model with about ``gb`` GB of bf16 weights; from 4 GB on with the usual widths."""
    width = 4096 if gb >= 4 else 1024
    vision = VisionConfig()
    if gb < 4:
        vision = VisionConfig(hidden_size=384, num_layers=4, num_heads=6, ffn_hidden_size=1536)
    language = LanguageConfig(
        family="llama",
        hidden_size=width,
        num_layers=0,
        num_heads=width // 128,
        num_kv_heads=width // 256,
        ffn_hidden_size=width * 11 // 4,
        vocab_size=32_000,
    )
    none = ModelConfig(language=language, vision=vision)
    one = replace(none, language=replace(language, num_layers=1))
    base = _num_bytes(none)
    layers = max(1, round((gb * 1e9 - base) / (_num_bytes(one) - base)))
    return replace(none, language=replace(language, num_layers=layers))


def _num_bytes(model: ModelConfig) -> int:
    shapes = tables.source_shapes(tables.llava_rules(model)).values()
    return sum(torch.Size(shape).numel() for shape in shapes) * DTYPE.itemsize


def make_model(folder: Path, gb: float) -> None:
    """Write a Hugging Face folder of a model with random weights, in shards."""
    model = model_of(gb)
    config = stock.llava_config(model, IDS, IMAGE_ID)
    config.architectures, config.dtype = [stock.LLAVA_ARCHITECTURE], DTYPE
    folder.mkdir()
    config.save_pretrained(str(folder))
    shapes = tables.source_shapes(tables.llava_rules(model))
    writer = ShardWriter(folder, {name: (x, DTYPE) for name, x in shapes.items()}, SHARD_BYTES)
    blocks = random_blocks()
    for name, shape in shapes.items():
        number = torch.Size(shape).numel()
        for start in range(0, number, BLOCK):
            writer.put(name, start, next(blocks)[: number - start])
    writer.close()


def random_blocks() -> Iterator[Tensor]:
    """Random numbers, each time the same ones, but at other places."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).to(DTYPE)
    for number in itertools.count():
        yield block.roll(number * 4099)


def make_run(imported: Path, run: Path) -> None:
    """Save imported weights as a run does that trains all but the encoder."""
    folder = RunFolder(run)
    step = folder.step(1)
    step.mkdir(parents=True)
    lines = [f"Question {i}: what is it? Answer: number {i * i}." for i in range(300)]
    TextTokenizer.train(lines, run / "text.model", vocab_size=330)
    tensors: dict[str, Tensor] = {}  # mapped, so that they need not be in memory
    for path in sorted(imported.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    frozen = {name: x for name, x in tensors.items() if name.startswith(f"{ENCODER}.")}
    trained = {name: x for name, x in tensors.items() if name not in frozen}
    changes = [f"model.text_tokenizer={run / 'text.model'}", "loss.visual_weight=0"]
    meta = Meta(
        resume=ResumeState(step=1),
        config=to_dict(override(load(imported / "config.yaml"), changes)),
        identity={},
        layout={},
        trained={name: list(x.shape) for name, x in trained.items()},
        frozen={ENCODER: write_frozen(folder, ENCODER, frozen, frozen.items(), attempt=0)},
        files=save(trained, step),
    )
    write_meta(step, meta)


def save(tensors: dict[str, Tensor], step: Path) -> dict[str, FileFacts]:
    """Size and checksum of the files of a distributed checkpoint, which this one rank writes."""
    whole = [
        Part(name, tuple(x.shape), (0,) * x.dim(), x, is_main=True, is_padded=False)
        for name, x in tensors.items()
    ]
    written = write.write(write.plan(whole, step, rank=0, copy=False))
    return written.files | write.write_index(step, written.entries, promised=tensors)
