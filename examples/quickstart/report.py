"""What a finished quick start came to: report.json for machines, report.md and plots for people."""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from examples.quickstart.data import write_atomically
from examples.quickstart.plots import plot_answers, plot_losses, read_metrics

STAGES = ("warmup", "stage1", "stage2", "blind_stage1", "blind_stage2")
PACKAGES = ("torch", "megatron-core", "nvidia-dali-cuda130", "transformers", "sentencepiece")


def write(out: Path, phases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The report, after writing report.json, report.md, losses.png and answers.png.

    Args:
        out: folder of the quick start.
        phases: markers by name, with ``seconds`` and ``peak_mem_bytes``.
    """
    seen, blind = (_read(out / name) for name in ("test.json", "blind_test.json"))
    result = {
        "test_accuracy": seen["accuracy"],
        "blind_accuracy": blind["accuracy"],
        "num_questions": seen["num_questions"],
        "losses": {name: _last(out / name, "train") for name in STAGES},
        "validation": {name: _last(out / name, "eval") for name in STAGES if name != "warmup"},
        "seconds": {name: round(marker["seconds"], 1) for name, marker in phases.items()},
        "seconds_total": round(sum(marker["seconds"] for marker in phases.values()), 1),
        "cpu_seconds": {name: round(marker["cpu_seconds"], 1) for name, marker in phases.items()},
        "cpu_seconds_total": round(sum(marker["cpu_seconds"] for marker in phases.values()), 1),
        "peak_mem_bytes": max(marker["peak_mem_bytes"] for marker in phases.values()),
        "encoder": _read(out / "encoder" / "quality.json"),
        "visual_tokenizer": _read(out / "visual_tokenizer" / "report.json"),
        "verify": _read(out / "verify.json"),
        "versions": {name: version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }
    plot_losses(
        {name: out / name / "metrics.jsonl" for name in ("warmup", "stage1", "stage2")},
        out / "losses.png",
    )
    plot_answers(seen["answers"], out / "answers.png")
    write_atomically(out / "report.json", json.dumps(result, indent=2) + "\n")
    write_atomically(out / "report.md", _markdown(result))
    return result


def shown_questions(answers: Path, places: Sequence[float]) -> list[tuple[str, str]]:
    """Question and image at some places (0 to 1) of an evaluation, open questions first."""
    rows = _read(answers)["answers"]
    open_rows = [row for row in rows if row["reference"] not in ("yes", "no")] or rows
    chosen = [open_rows[int(len(open_rows) * place)] for place in places]
    return [(row["question"], row["images"][0]) for row in chosen]


def _last(run: Path, kind: str) -> dict[str, float]:
    """The last logged losses and accuracies of a run."""
    rows = read_metrics(run / "metrics.jsonl", kind)
    last = rows[-1] if rows else {}
    wanted = ("loss", "text_loss", "text_accuracy", "visual_loss", "visual_accuracy", "step")
    return {key: value for key, value in last.items() if key.startswith(wanted)}


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        "# Quick start",
        "",
        f"- test accuracy **{result['test_accuracy']:.4f}** on {result['num_questions']} questions "
        "of the test split, each asked alone, greedy answers, exact match",
        f"- the same training with blank images: {result['blind_accuracy']:.4f}",
        f"- {result['seconds_total'] / 60:.1f} minutes in all, "
        f"{result['cpu_seconds_total'] / 60:.1f} CPU-minutes; peak memory "
        f"{result['peak_mem_bytes'] / 2**30:.2f} GiB",
        f"- reloaded with transformers {result['verify']['transformers']}: logits differ by at "
        f"most {result['verify']['logits_max_abs']:.1e}, "
        f"{result['verify']['num_answers_equal']} of {result['verify']['num_samples']} greedy "
        "answers equal",
        "",
        "Everything here shows that the system works; at this size it says nothing about the "
        "method's gain.",
        "",
        "| phase | seconds | CPU-seconds |",
        "|---|---|---|",
        *(
            f"| {name} | {seconds:.0f} | {result['cpu_seconds'][name]:.0f} |"
            for name, seconds in result["seconds"].items()
        ),
        "",
        "| run | text loss | visual loss | code accuracy by depth |",
        "|---|---|---|---|",
        *(_row(name, values) for name, values in result["losses"].items()),
        "",
        "![losses](losses.png)",
        "",
        "![answers on test images](answers.png)",
        "",
    ]
    return "\n".join(lines)


def _row(name: str, values: dict[str, float]) -> str:
    depths = [v for k, v in sorted(values.items()) if k.startswith("visual_accuracy_")]
    visual = f"{values['visual_loss']:.3f}" if "visual_loss" in values else "-"
    shown = " ".join(f"{v:.2f}" for v in depths) or "-"
    return f"| {name} | {values.get('text_loss', float('nan')):.4f} | {visual} | {shown} |"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
