"""Pictures of a finished quick start: how the losses fell, and what the model sees and says."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from PIL import Image

COLUMNS, ROWS = 5, 3


def read_metrics(path: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of a kind in a run's metrics.jsonl, in order."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line.get("kind") == kind]


def plot_losses(runs: dict[str, Path], out: Path) -> None:
    """Text loss, visual loss and code accuracy of every depth over the steps of all runs.

    Args:
        runs: metrics.jsonl by the name of the run, in the order they were trained.
        out: PNG file.
    """
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for axis, title in zip(
        axes, ("text loss", "visual loss", "code accuracy by depth"), strict=True
    ):
        axis.set(title=title, xlabel="step (all stages)")
        axis.grid(alpha=0.3)
    start = 0
    for name, path in runs.items():
        rows = read_metrics(path, "train")
        steps = [start + row["step"] for row in rows]
        axes[0].plot(steps, [row["text_loss"] for row in rows], label=name)
        if rows and "visual_loss" in rows[0]:
            axes[1].plot(steps, [row["visual_loss"] for row in rows], label=name)
            depth = sum(key.startswith("visual_accuracy_") for key in rows[0])
            for d in range(depth):
                values = [row[f"visual_accuracy_{d}"] for row in rows]
                known = axes[2].get_legend_handles_labels()[1]
                label = f"depth {d}" if f"depth {d}" not in known else ""
                axes[2].plot(steps, values, color=f"C{d}", label=label)
        for axis in axes:
            axis.axvline(start, color="grey", linewidth=0.5)
        start = steps[-1] if steps else start
    axes[0].set_yscale("log")
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    _save(figure, out)


def plot_answers(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Test images with question, answer and truth; wrong answers in red.

    Args:
        rows: of `asvr eval`; they are spread evenly over all, each image once.
        out: PNG file.
    """
    by_image = {row["images"][0]: row for row in rows}
    images = list(by_image)
    count = min(COLUMNS * ROWS, len(images))
    figure, axes = plt.subplots(ROWS, COLUMNS, figsize=(15, 10.5), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for place in range(count):
        image = images[len(images) * place // count]
        questions = [row for row in rows if row["images"][0] == image]
        row = questions[place % len(questions)]
        axis = axes.flat[place]
        axis.imshow(Image.open(image).convert("RGB"))
        verdict = "" if row["correct"] else f"  (truth: {row['reference']})"
        axis.set_title(
            f"{row['question']}\n{row['answer']}{verdict}",
            color="black" if row["correct"] else "red",
            fontsize=10,
        )
    _save(figure, out)


def _save(figure: Any, out: Path) -> None:
    part = out.with_name(f".{out.name}")
    figure.savefig(part, dpi=110, format="png")
    plt.close(figure)
    part.replace(out)
