"""What a run tells: a progress line, metrics.jsonl, and wandb; only rank 0 writes."""

import contextlib
import json
import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_asvr.checkpoint.folder import RunFolder
from megatron_asvr.config.load import to_dict
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import ConfigError
from megatron_asvr.log import clock
from megatron_asvr.model.loss import read_totals
from megatron_asvr.train.step import Agreement, StepResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recount:
    """What was cached and computed again (train/recheck.py).

    Attributes:
        images: how many images.
        positions: how many patches they have.
        flips: codes of every depth that were different.
        features: features that were different; None where none are cached.
    """

    images: int
    positions: int
    flips: tuple[int, ...]
    features: int | None = None

    def shares(self) -> list[float]:
        """Share of different codes of every depth."""
        return [flips / max(1, self.positions) for flips in self.flips]

    def feature_share(self) -> float:
        """Share of different features."""
        return (self.features or 0) / max(1, self.positions)


@dataclass(kw_only=True, slots=True)
class Window:
    """The steps since the last logged line; it is saved with a checkpoint, so lines survive it.

    Attributes:
        steps: optimizer steps in it.
        totals: sum of their ``StepResult.totals``.
        loss: sum of their losses.
        grad_norm: sum of their gradient norms.
        num_tokens: positions without padding.
        data_s: seconds spent waiting for data.
        train_s: seconds spent in the steps, waiting included.
        recounted: sum of ``Agreement.recounted``.
        work: sum of ``Agreement.work``.
        busy_s: seconds of these in which a pass of this rank ran.
        passes_s: seconds of these until the passes of all ranks were over.
        wait_s: seconds of these in which this rank waited, after its own, for the passes of others.
        pauses: seconds between the steps, by what they went into.
    """

    steps: int = 0
    totals: list[float] = field(default_factory=list)
    loss: float = 0.0
    grad_norm: float = 0.0
    num_tokens: int = 0
    data_s: float = 0.0
    train_s: float = 0.0
    recounted: list[int] = field(default_factory=list)
    work: list[int] = field(default_factory=list)
    busy_s: float = 0.0
    passes_s: float = 0.0
    wait_s: float = 0.0
    pauses: dict[str, float] = field(default_factory=dict)

    def add(
        self, result: StepResult, agreement: Agreement, *, data_s: float, train_s: float
    ) -> None:
        """Count one more step."""
        self.totals = _sums(self.totals, result.totals.tolist())
        self.steps += 1
        self.loss += result.loss
        self.grad_norm += result.grad_norm
        self.num_tokens += agreement.num_tokens
        self.data_s += data_s
        self.train_s += train_s
        self.recounted = _sums(self.recounted, agreement.recounted)
        self.work = _sums(self.work, agreement.work)
        self.busy_s += result.busy_s
        self.passes_s += result.own_s + result.wait_s
        self.wait_s += result.wait_s

    @contextlib.contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """What passes inside is no part of a step."""
        started = time.perf_counter()
        yield
        self.pauses[name] = self.pauses.get(name, 0.0) + time.perf_counter() - started

    @property
    def recount(self) -> Recount:
        """What was cached and computed again."""
        images, positions, *counts = self.recounted or (0, 0)
        depth = (len(self.totals) - 4) // 2  # see ``LossSums.totals``
        flips, (features, *_) = counts[:depth], (*counts[depth:], None)
        return Recount(images=images, positions=positions, flips=tuple(flips), features=features)

    def values(self) -> dict[str, float]:
        """Means over the window: losses per target, the rest per step or second."""
        totals: Tensor = torch.tensor(self.totals, dtype=torch.float64)
        recount = self.recount
        checked = {f"code_flips_{d}": share for d, share in enumerate(recount.shares())}
        checked |= {} if recount.features is None else {"features_moved": recount.feature_share()}
        return {
            "loss": self.loss / self.steps,
            **read_totals(totals),
            "grad_norm": self.grad_norm / self.steps,
            "tokens_per_s": self.num_tokens / self.train_s,
            "step_s": self.train_s / self.steps,
            "data_wait": self.data_s / self.train_s,
            **{f"{name}_s": seconds for name, seconds in self.pauses.items()},
            **({"codes_checked_images": recount.images, **checked} if recount.images else {}),
        }


def _sums(old: list[Any], new: Sequence[Any]) -> list[Any]:
    """Sums of numbers, of which there are none before the first."""
    return [a + b for a, b in zip(old, new, strict=True)] if old else list(new)


def progress_line(values: Mapping[str, float], *, step: int, total_steps: int) -> str:
    """One line for a person.

    Args:
        values: of a window, with ``lr``, and since the run began ``bad_samples`` and
            ``skipped_batches``.
        step: steps done.
        total_steps: steps of the whole run.
    """
    line = f"step {step}/{total_steps} loss {values['loss']:.4f} text {values['text_loss']:.4f}"
    if "visual_loss" in values:
        depths = (v for key, v in values.items() if key.startswith("visual_loss_"))
        line += f" visual {values['visual_loss']:.4f} [{' '.join(f'{v:.3f}' for v in depths)}]"
    line += f" lr {values['lr']:.2e} gnorm {values['grad_norm']:.3f}"
    line += f" tok/s {values['tokens_per_s']:,.0f}"
    line += f" MFU {values['mfu']:.0%}" if "mfu" in values else ""
    if "codes_checked_images" in values:
        shares = (v for key, v in values.items() if key.startswith("code_flips_"))
        line += f" codes of {values['codes_checked_images']} images checked, flips"
        line += f" [{' '.join(f'{v:.1%}' for v in shares)}]"
        moved = values.get("features_moved")
        line += "" if moved is None else f", features moved {moved:.1%}"
    line += f" ETA {clock((total_steps - step) * values['step_s'])}"
    line += f" data {values['data_wait']:.0%}"
    line += f" bubble {values['bubble']:.0%}" if "bubble" in values else ""
    for name in ("bad_samples", "skipped_batches"):
        line += f" {name.partition('_')[0]} {values[name]}" if values.get(name) else ""
    return line


class MetricsLog:
    """``with MetricsLog(...) as log:`` appends to metrics.jsonl and wandb, and closes both.

    Args:
        folder: the run's folder.
        config: the run's configuration.
        done_steps: steps of the checkpoint the run continues from: later lines are dropped first.
        attempt: number of this start.
        active: true on rank 0 only; the others write nothing.

    Raises:
        CheckpointError: the file cannot be written, or a newer start of the same run is at work.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        *,
        done_steps: int,
        attempt: int,
        active: bool,
    ) -> None:
        self._file = None
        self._wandb: Any = None
        if active:
            # An older start that still lives has the old file, which has no name any more.
            with folder.being_written(), folder.written(folder.metrics, attempt) as path:
                self._file = path.open("w", encoding="utf-8")
                self._file.writelines(kept_lines(folder.metrics, done_steps))
                self._file.flush()
            self._wandb = _start_wandb(folder, config, attempt)

    def write(self, step: int, kind: str, values: Mapping[str, float | str | None]) -> None:
        """Add one line.

        Args:
            step: steps done.
            kind: ``start``, ``train``, ``eval``, ``cosine``, ``fp8``, ``save``, ``slow``; begins
                the names in wandb.
            values: numbers by name, and hashes; None is a number that does not exist at this step.
        """
        if self._file is None:
            return
        line = json.dumps({"step": step, "kind": kind, **values}) + "\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as err:  # of a full disk, say: what was not written is tried again
            logger.warning("%s: %s", self._file.name, err)
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": v for name, v in values.items()}, step=step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as err:
                logger.warning("%s: %s", self._file.name, err)
        if self._wandb is not None:
            import wandb

            self._wandb.finish(exit_code=0 if kind is None else 1)
            wandb.teardown()  # without it the offline file may stay incomplete


def kept_lines(path: Path, done_steps: int) -> list[str]:
    """The lines of steps up to ``done_steps``, without a last one that was cut off."""
    kept: list[str] = []
    if not path.is_file():
        return kept
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if step <= done_steps and line.endswith("\n"):
            kept.append(line)
    return kept


def last_values(path: Path, kind: str) -> dict[str, Any]:
    """The last line of a kind in metrics.jsonl; empty when there is none."""
    found: dict[str, Any] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            if values["kind"] == kind:
                found = values
    return found


def _start_wandb(folder: RunFolder, config: Config, attempt: int) -> Any:
    if config.run.wandb == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"run.wandb={config.run.wandb!r} needs the package wandb; install it (pip install "
            "wandb) or set run.wandb=disabled"
        ) from None
    number = folder.root / "wandb_id"  # one run for wandb, however often it is started
    if not number.exists():
        with folder.being_written(), folder.written(number, attempt) as path:
            path.write_text(secrets.token_hex(4), encoding="utf-8")
    settings = wandb.Settings(
        silent=True,
        console="off",  # the rank logs have it
        x_disable_stats=True,  # sampling would take time from a rank on a small machine
        x_save_requirements=False,
        disable_git=True,
        save_code=False,
    )
    return wandb.init(
        project=config.run.wandb_project,
        name=folder.root.name,
        dir=folder.root,
        mode=config.run.wandb,
        id=number.read_text(encoding="utf-8"),
        resume="allow",
        config=to_dict(config),
        settings=settings,
    )
