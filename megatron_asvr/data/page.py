"""A page that shows one step's samples as training sees them: no file beside it, no script in it.

Images are the encoder's pixels, decoded by the run's own path, first the whole picture, then its
tiles. Text is what the token ids say; words that bear loss are marked. Whatever comes from the data
is escaped, and the page forbids scripts.
"""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_asvr.batch import IGNORE
from megatron_asvr.data.pil import PIXEL_MEAN, PIXEL_STD
from megatron_asvr.data.plan import Plan
from megatron_asvr.data.sample import Row, Sample
from megatron_asvr.data.text import TextTokenizer

Pixels = Callable[[Sequence[str]], Tensor]  # keys of views to float32 [I, C, H, W]

SIDE = 160  # pixels of a view on the page
IMAGE = "image"  # what stands in the place of its positions

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; color: #222; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6em; }
mark { background: #ffe08a; } .token { color: #888; } .picture { color: #06c; }
.views img { margin: 0 4px 4px 0; border: 1px solid #ccc; }
.row { position: relative; height: 18px; margin: 2px 0; background: #eee; }
.row div { position: absolute; top: 0; bottom: 0; overflow: hidden; }
.document { background: #9cc4e4; border-right: 1px solid #fff; box-sizing: border-box; }
.picture-span { background: #2b6a99; top: 6px !important; }
table { border-collapse: collapse; } td, th { padding: 0 .8em 0 0; text-align: left; }
"""


def step_page(
    step: int,
    samples: Sequence[tuple[Sample, list[list[str]]]],
    plan: Plan,
    *,
    total: int,
    shown: int,
    tokenizer: TextTokenizer,
    pixels: Pixels,
    report: Mapping[str, Any],
) -> str:
    """The page.

    Args:
        step: number of the step.
        samples: of its global batch, in order, with the keys of every picture's views.
        plan: of the step.
        total: samples of the global batch, bad ones included.
        shown: samples that are shown whole; the map shows all.
        tokenizer: of the text.
        pixels: decodes views.
        report: of the loader.
    """
    cut = [sample for sample, _ in samples if sample.cut_tokens]
    facts = {
        "samples": total,
        "without anything to learn": total - len(samples),
        "rows or packed sequences": len(plan.items),
        "images for the encoder": plan.images,
        "samples that lost text": len(cut),
        "tokens cut": sum(sample.cut_tokens for sample in cut),
        "conversations that did not fit": sum(sample.dropped_rows for sample, _ in samples),
        "targets lost to shared prefixes": sum(sample.lost_targets for sample, _ in samples),
        "bad images of the split": report["num_bad_images"],
        "records that cannot be used": report["bad_records"],
    }
    parts = [
        "<!doctype html><meta charset=utf-8>",
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:; "
        "style-src 'unsafe-inline'\">",
        f"<title>step {step}</title><style>{_STYLE}</style><h1>Step {step}</h1>",
        _table(facts),
        "<h2>Sequences</h2><p>A bar is a sequence, a block a document, dark an image.</p>",
        *(_sequence(item, samples, max(plan.lengths)) for item in plan.items),
        "<h2>Samples</h2><p>The words that bear loss are <mark>marked</mark>.</p>",
        *(_sample(sample, views, tokenizer, pixels) for sample, views in samples[:shown]),
    ]
    if report["bad_images"]:
        parts += ["<h2>Bad images</h2>", _table(report["bad_images"])]
    return "\n".join(parts) + "\n"


def loss_bearing(row: Row) -> np.ndarray:
    """Which tokens of a row some position has to predict, [S]."""
    bears = np.zeros(row.length, dtype=bool)
    same = row.branch_S[1:] == row.branch_S[:-1]
    bears[1:] = (row.targets_S[:-1] != IGNORE) & same & (row.targets_S[:-1] == row.tokens_S[1:])
    return bears


def _table(values: Mapping[str, Any]) -> str:
    rows = (f"<tr><td>{_safe(name)}<td>{_safe(value)}" for name, value in values.items())
    return f"<table>{''.join(rows)}</table>"


def _sequence(
    item: Sequence[tuple[int, int]],
    samples: Sequence[tuple[Sample, list[list[str]]]],
    longest: int,
) -> str:
    parts, start = [], 0
    for place, number in item:
        sample = samples[place][0]
        row = sample.rows[number]
        title = f"{sample.id}: {row.length} positions"
        parts.append(_block("document", start, row.length, longest, title))
        for begin, layout in zip(row.image_starts, row.layouts, strict=True):
            inside = max(0, min(layout.length, row.length - begin))
            parts.append(_block("picture-span", start + begin, inside, longest, f"{title}, image"))
        start += row.length
    return f"<div class=row>{''.join(parts)}</div>"


def _block(kind: str, start: int, length: int, longest: int, title: str) -> str:
    left, width = 100 * start / longest, 100 * length / longest
    return (
        f'<div class={kind} style="left:{left:.3f}%;width:{width:.3f}%" title="{_safe(title)}">'
        "</div>"
    )


def _sample(
    sample: Sample, views: list[list[str]], tokenizer: TextTokenizer, pixels: Pixels
) -> str:
    facts = f"{len(sample.rows)} rows" if len(sample.rows) > 1 else f"{sample.rows[0].length}"
    parts = [
        f"<h3>{_safe(sample.id)}</h3><p>{_safe(facts)} positions, {len(sample.images)} images, "
        f"{sample.cut_tokens} tokens cut, {sample.lost_targets} targets lost</p>"
    ]
    for path, keys in zip(sample.images, views, strict=True):
        shown = "".join(_image(view) for view in pixels(keys))
        parts.append(f"<div class=views>{shown}</div><p>{_safe(path)}</p>")
    parts += [f"<pre>{_text(row, tokenizer)}</pre>" for row in sample.rows]
    return "\n".join(parts)


def _image(pixels_CHW: Tensor) -> str:
    raw = (pixels_CHW.cpu() * PIXEL_STD + PIXEL_MEAN).round().clamp(0, 255).to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(raw.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width={SIDE} height={SIDE} src="data:image/png;base64,{data}">'


def _text(row: Row, tokenizer: TextTokenizer) -> str:
    """The row's text: runs of words with and without loss, of one conversation each."""
    bears, parts, branch = loss_bearing(row), [], 0
    pictures = {
        place
        for begin, layout in zip(row.image_starts, row.layouts, strict=True)
        for place in range(begin, begin + layout.length)
    }
    places = range(row.length)
    for (picture, own, loss), run in groupby(
        places, key=lambda i: (i in pictures, int(row.branch_S[i]), bool(bears[i]))
    ):
        inside = list(run)
        if own != branch:
            parts.append("\n" + f"<span class=token>[conversation {own}]</span> ")
            branch = own
        if picture:
            parts.append(f"<span class=picture>[{IMAGE}: {len(inside)} positions]</span>")
            continue
        words = "".join(_words([int(row.tokens_S[i]) for i in inside], tokenizer))
        parts.append(f"<mark>{words}</mark>" if loss else words)
    return "".join(parts)


def _words(ids: Sequence[int], tokenizer: TextTokenizer) -> list[str]:
    """Text of the ids, escaped; ids without any, such as those that end an answer, by number."""
    parts = []
    special = {tokenizer.bos_id: "begin", tokenizer.eos_id: "end", tokenizer.pad_id: "pad"}
    for named, run in groupby(ids, key=lambda i: i if i in special else None):
        inside = list(run)
        if named is None:
            parts.append(_safe(tokenizer.decode(inside)))
        else:
            parts.append(f"<span class=token>[{special[named]}]</span>" * len(inside))
    return parts


def _safe(value: Any) -> str:
    return html.escape(str(value), quote=True)
