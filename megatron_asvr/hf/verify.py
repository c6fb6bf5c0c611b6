"""The proof of an export: reload it with transformers alone and compare with the trained model.

Four questions per sample, each with its own figure in the report, so that a failure says where it
is: does the saved processor give our token ids, does it give our pixels, does the saved model give
our logits (from our ids and our pixels, so that only weights and settings are compared), and does
the whole, from the text and the picture, generate our answer.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_asvr.data import locations
from megatron_asvr.data.pil import upright
from megatron_asvr.data.text import SENTENCEPIECE_MODEL
from megatron_asvr.errors import ConversionError
from megatron_asvr.hf import stock
from megatron_asvr.hf.processor import tokenizer_loader
from megatron_asvr.hf.stock import transformers

# fp32 against fp32 of the same weights; the orders of summation differ.
LOGITS_TOLERANCE = 1e-4
# In units of normalised pixels (2 = black to white). DALI against PIL: mean 0.088, max 10 of 255.
# Wrong padding has a mean of 1.95 of 255, no antialiasing 0.57; data/pil.py agrees to 6e-8.
PIXEL_MEAN_TOLERANCE = 0.25 / 127.5
PIXEL_MAX_TOLERANCE = 12 / 127.5
SHOWN_MISMATCHES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifySample:
    """One question as this project's own model sees and answers it, in fp32.

    Attributes:
        name: for messages.
        prompt: the whole prompt as text, one ``<image>`` per image, no begin symbol.
        images: pictures (PIL) or paths of files, in order.
        token_ids: our ids of the prompt, image tokens expanded, begin symbol first.
        pixel_values_ICHW: our pixels, float32; None without images.
        logits_ST: our logits at all positions of the prompt, float32.
        answer_ids: our greedy answer, with or without the end symbol.
        answer: its text.
        messages: the same question as chat messages, to check the chat template; optional.
    """

    name: str
    prompt: str
    images: tuple[Any, ...]
    token_ids: tuple[int, ...]
    pixel_values_ICHW: Tensor | None
    logits_ST: Tensor
    answer_ids: tuple[int, ...]
    answer: str
    messages: list[dict[str, Any]] | None = None


def verify(
    folder: str | Path,
    samples: Sequence[VerifySample],
    *,
    max_new_tokens: int,
    logits_tolerance: float = LOGITS_TOLERANCE,
) -> dict[str, Any]:
    """A report with ``ok``, the largest differences, and the first mismatches in words.

    Args:
        folder: an exported folder. For weights saved in bf16 the samples must come from a
            model that was loaded from the same rounded weights.
        samples: at least one.
        max_new_tokens: greedy answers are cut here, ours and theirs.
        logits_tolerance: largest allowed absolute difference.

    Raises:
        ConversionError: the folder does not load completely, or there is nothing to compare.
    """
    if not samples:
        raise ConversionError("verify needs at least one sample with our own results")
    started = time.monotonic()
    model, processor = load_stock(folder)
    results = [_compare(model, processor, s, max_new_tokens) for s in samples]
    worst = {key: max(r[key] for r in results) for key in _FIGURES}
    limits = dict.fromkeys(_FIGURES, float("inf"))
    limits |= {
        "logits_max_abs": logits_tolerance,
        "pixels_max_abs": PIXEL_MAX_TOLERANCE,
        "pixels_mean_abs": PIXEL_MEAN_TOLERANCE,
    }
    mismatches = [m for r in results for m in r["mismatches"]]
    for r in results:
        # Written so that NaN is a mismatch.
        over = [k for k in _FIGURES if not r[k] <= limits[k]]
        mismatches += [f"{r['name']}: {k} is {r[k]:.3g}, limit {limits[k]:.3g}" for k in over]
    return {
        "ok": not mismatches,
        "folder": str(folder),
        "transformers": transformers().__version__,
        "architecture": type(model).__name__,
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_samples": len(results),
        "num_ids_equal": sum(r["ids_equal"] for r in results),
        "num_answers_equal": sum(r["answer_equal"] for r in results),
        **worst,
        "logits_tolerance": logits_tolerance,
        "top1_agreement": sum(r["top1_agreement"] for r in results) / len(results),
        "num_mismatches": len(mismatches),
        "mismatches": mismatches[:SHOWN_MISMATCHES],
        "seconds": round(time.monotonic() - started, 2),
    }


_FIGURES = ("logits_max_abs", "pixels_max_abs", "pixels_mean_abs", "logits_max_abs_own_pixels")


def exported_dtype(folder: str | Path) -> torch.dtype:
    """The type that an exported folder's weights are stored in.

    Raises:
        ConversionError: the folder holds no readable configuration.
    """
    return stock.read_hf_config(folder).dtype


def load_stock(folder: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model (for evaluation) and processor of an exported folder, as a user would load them.

    A language model alone has its tokenizer for a processor.

    Args:
        folder: in Hugging Face format.
        dtype: of the model.

    Raises:
        ConversionError: something is missing, left over, or does not load.
    """
    library = transformers()
    try:
        (architecture,) = stock.read_hf_config(folder).architectures
        model, info = getattr(library, architecture).from_pretrained(
            str(folder), dtype=dtype, local_files_only=True, output_loading_info=True
        )
        families = {name: family for family, name in stock.TEXT_ARCHITECTURES.items()}
        loader = "AutoProcessor"
        if (family := families.get(architecture)) is not None:
            own = (Path(folder) / SENTENCEPIECE_MODEL).is_file()
            loader = tokenizer_loader("text", family, sentencepiece=own)
        processor = getattr(library, loader).from_pretrained(str(folder), local_files_only=True)
    except Exception as e:  # transformers raises many types here, all of them about this folder
        raise ConversionError(f"{folder} does not load with transformers: {e}") from e
    odd = {k: sorted(map(str, v))[:SHOWN_MISMATCHES] for k, v in info.items() if v}
    if odd:
        raise ConversionError(f"{folder} does not load completely with transformers: {odd}")
    return model.eval(), processor


@torch.no_grad()
def _compare(model: Any, processor: Any, sample: VerifySample, max_new_tokens: int) -> dict:
    pictures = {"images": _pictures(sample.images)} if sample.images else {}
    inputs = processor(text=sample.prompt, return_tensors="pt", **pictures)
    inputs.pop("token_type_ids", None)  # a tokenizer's, which no model here takes
    mismatches = []
    theirs = tuple(inputs["input_ids"][0].tolist())
    if theirs != sample.token_ids:
        mismatches.append(f"{sample.name}: ids {_difference(sample.token_ids, theirs)}")
    their_pixels, sizes = _views(model, inputs)
    pixels = _pixel_difference(sample, their_pixels)
    if sample.messages is not None:
        said = processor.apply_chat_template(
            sample.messages, add_generation_prompt=True, tokenize=False
        )
        if hasattr(processor, "image_processor"):
            same = said == sample.prompt
        else:  # a tokenizer alone adds no begin symbol to a chat, so there the template has it
            ids = processor(text=said, add_special_tokens=False)["input_ids"]
            same = tuple(ids) == sample.token_ids
        if not same:
            mismatches.append(f"{sample.name}: chat template {said!r}, prompt {sample.prompt!r}")
    ours_TS = torch.tensor([sample.token_ids])
    seen, whole = (
        model(input_ids=ours_TS, **({} if x is None else {"pixel_values": x, **sizes})).logits[0]
        for x in (sample.pixel_values_ICHW, their_pixels)
    )
    if seen.shape != sample.logits_ST.shape:
        raise ConversionError(
            f"{sample.name}: our logits have shape {tuple(sample.logits_ST.shape)}, "
            f"transformers' {tuple(seen.shape)}"
        )
    answer, answer_ids = _generate(model, processor, inputs, max_new_tokens)
    wanted = _trimmed(sample.answer_ids, model.generation_config)
    equal = answer_ids == wanted and _same_text(answer, sample.answer)
    if not equal:
        mismatches.append(f"{sample.name}: answer {answer!r} {answer_ids}, ours {sample.answer!r}")
    return {
        "name": sample.name,
        "mismatches": mismatches,
        "ids_equal": theirs == sample.token_ids,
        "answer_equal": equal,
        "pixels_max_abs": float(pixels.max()),
        "pixels_mean_abs": float(pixels.mean()),
        "logits_max_abs": float((seen - sample.logits_ST).abs().max()),
        "logits_max_abs_own_pixels": float((whole - sample.logits_ST).abs().max()),
        "top1_agreement": float((seen.argmax(-1) == sample.logits_ST.argmax(-1)).double().mean()),
    }


def _views(model: Any, inputs: Any) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The processor's pixels [I, C, H, W] of all views, and what else the model asks about them."""
    pixels, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
    if sizes is None:
        return pixels, {}
    side, pinpoints = model.config.vision_config.image_size, model.config.image_grid_pinpoints
    count = transformers().models.llava_next.modeling_llava_next.image_size_to_num_patches
    counts = [count(size, pinpoints, side) for size in sizes]
    views = [own[:n] for own, n in zip(pixels, counts, strict=True)]
    return torch.cat(views), {"image_sizes": sizes}


def _pictures(images: Sequence[Any]) -> list[Any]:
    """PIL pictures; files are opened as this project reads them: upright, transparency on white.

    What a processor makes of a file's EXIF and transparency is not the model's: transformers drops
    the latter, so whoever asks an exported model opens such files like this.
    """
    return [upright(locations.read(str(x))) if isinstance(x, str | Path) else x for x in images]


def _pixel_difference(sample: VerifySample, theirs: Tensor | None) -> Tensor:
    ours = sample.pixel_values_ICHW
    if ours is None and theirs is None:
        return torch.zeros(1)
    if ours is None or theirs is None or ours.shape != theirs.shape:
        shapes = [None if x is None else tuple(x.shape) for x in (ours, theirs)]
        raise ConversionError(f"{sample.name}: our pixels are {shapes[0]}, theirs {shapes[1]}")
    return (ours - theirs).abs()


def _difference(ours: Sequence[int], theirs: Sequence[int]) -> str:
    pairs = zip(ours, theirs, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    cut = slice(first, first + SHOWN_MISMATCHES)
    return (
        f"{len(theirs)} in transformers, {len(ours)} ours, first difference at {first}: "
        f"{list(theirs[cut])} against {list(ours[cut])}"
    )


def _generate(model: Any, processor: Any, inputs: Any, max_new_tokens: int) -> tuple[str, tuple]:
    out = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    ids = out[0, inputs["input_ids"].shape[1] :].tolist()
    trimmed = _trimmed(ids, model.generation_config)
    return processor.decode(trimmed, skip_special_tokens=True), trimmed


def _same_text(theirs: str, ours: str) -> bool:
    """Whether two texts of the same ids agree.

    Bytes that are no UTF-8 (an untrained model emits them) become replacement characters, as many
    as each library likes.
    """
    broken = "\ufffd"
    return theirs.strip() == ours.strip() or (broken in theirs and broken in ours)


def _trimmed(ids: Sequence[int], generation: Any) -> tuple[int, ...]:
    """The ids before the end symbol."""
    end = generation.eos_token_id
    return tuple(ids[: ids.index(end)]) if end in ids else tuple(ids)
