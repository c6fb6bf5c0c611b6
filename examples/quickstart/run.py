"""The whole way on real images: data, encoder, tokenizers, three stages, evaluation, export.

    make quickstart            everything, into runs/quickstart (about ten minutes)
    make quickstart-short      the same code on few images and steps, into runs/quickstart-short

Interrupt it at any point and run it again: it continues. Every step but the first three is a call
of the command `asvr`; the lines it prints can be typed by hand.
"""

import argparse
import ctypes
import hashlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from examples.quickstart import data, report, vision
from examples.quickstart.phases import Phase, Phases

HERE = Path(__file__).parent
CODEBOOKS = ("--depth", "4", "--codebook-size", "64")
VOCAB_SIZE = 384  # 256 bytes, special symbols, and the words of the questions
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # linux/prctl.h
ASKED = (0.2, 0.5, 0.8)  # where in the test split the three shown questions are


@dataclass(frozen=True, kw_only=True, slots=True)
class Short:
    """What the short form changes: sizes only, never the code path."""

    images: int = 240  # of each split
    encoder_steps: int = 40
    stage_steps: int = 30


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickStart:
    """One quick start.

    Attributes:
        out: where everything goes.
        short: sizes of the short form; None is the whole one.
    """

    out: Path
    short: Short | None = None

    def phases(self) -> list[Phase]:
        """All phases, in order."""
        return [
            self._prepare_data(),
            self._train_encoder(),
            self._train_text_tokenizer(),
            self._fit_visual_tokenizer(),
            self._train("warmup", "warmup"),
            self._train("stage1", "stage1"),
            self._train("stage2", "stage2"),
            self._evaluate("test", "stage2"),
            self._train("blind_stage1", "stage1", "data.blank_images=true"),
            self._train("blind_stage2", "stage2", "data.blank_images=true", start="blind_stage1"),
            self._evaluate("blind_test", "blind_stage2"),
            self._asvr(
                "export",
                "convert",
                "export",
                self._run("stage2"),
                "--out",
                str(self.out / "hf"),
                outputs=[self.out / "hf"],
            ),
            self._asvr(
                "verify",
                "convert",
                "verify",
                self._run("stage2"),
                str(self.out / "hf"),
                "--verify",
                "full",
                *self._questions("test"),
                "--samples",
                "24",
                "--out",
                str(self.out / "verify.json"),
            ),
            Phase(name="ask", run=self.ask, inputs=[str(ASKED)]),
        ]

    def _prepare_data(self) -> Phase:
        limit = self.short.images if self.short else None
        folder = self.out / "data"
        return Phase(
            name="data",
            run=lambda: say(str(data.prepare(folder, limit=limit))),
            inputs=[code_of(data), str(limit)],
            outputs=[folder],
        )

    def _train_encoder(self) -> Phase:
        steps = self.short.encoder_steps if self.short else vision.STEPS
        folder = self.out / "encoder"
        return Phase(
            name="encoder",
            run=partial(vision.train, self.out / "data", folder, steps=steps, say=say),
            inputs=[code_of(vision), str(steps)],
            outputs=[folder],
            continues=True,
        )

    def _train_text_tokenizer(self) -> Phase:
        target = self.out / "text.model"

        def run() -> None:
            from megatron_asvr.data.text import TextTokenizer

            lines = (self.out / "data" / "corpus.txt").read_text(encoding="utf-8").splitlines()
            TextTokenizer.train(lines, target, vocab_size=VOCAB_SIZE)

        return Phase(name="text_tokenizer", run=run, inputs=[str(VOCAB_SIZE)], outputs=[target])

    def _fit_visual_tokenizer(self) -> Phase:
        folder = self.out / "visual_tokenizer"
        return self._asvr(
            "visual_tokenizer",
            "tokenizer",
            "fit",
            "--vision",
            str(self.out / "encoder"),
            "--data",
            str(self.out / "data" / "train.json"),
            "--images",
            str(self.out / "data" / "images"),
            "--out",
            str(folder),
            *CODEBOOKS,
            outputs=[folder],
        )

    def _train(self, name: str, stage: str, *changes: str, start: str = "stage1") -> Phase:
        """A training run called ``name`` with the settings of ``stage``.yaml."""
        file = HERE / f"{stage}.yaml"
        settings = [f"run.dir={self._run(name)}", *self._paths(stage, start), *changes]
        if self.short:
            settings += [f"train.steps={self.short.stage_steps}", "train.save_every_steps=20"]
        return self._asvr(
            name,
            "train",
            str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file),
            *settings,
            inputs=[path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.yaml"))],
            outputs=[Path(self._run(name))],
            continues=True,
        )

    def _paths(self, stage: str, start: str) -> list[str]:
        """Settings that point a stage's YAML, written for runs/quickstart, into ``out``."""
        folder, images = self.out / "data", self.out / "data" / "images"
        text = stage == "warmup"
        source = "text.json" if text else "train.json"
        settings = [
            f"model.text_tokenizer={self.out / 'text.model'}",
            f"data.train=[{{path: {folder / source}, images: {images}}}]",
        ]
        if text:
            return settings
        settings += [
            f"model.visual_tokenizer={self.out / 'visual_tokenizer'}",
            f"data.eval=[{{path: {folder / 'val.json'}, images: {images}}}]",
            f"data.cache_dir={self.out / 'codes'}",
        ]
        if stage == "stage1":
            settings.append(f"init.vision_encoder={self.out / 'encoder'}")
            return [*settings, f"init.language_model={self._run('warmup')}"]
        return [*settings, f"init.all={self._run(start)}"]

    def _evaluate(self, name: str, run: str) -> Phase:
        """Every test question asked alone; two replicas of one rank share the questions."""
        return self._asvr(
            name,
            "eval",
            self._run(run),
            *self._questions("test"),
            "--max-new-tokens",
            "8",
            "--out",
            str(self.out / f"{name}.json"),
            "--ranks",
            "2",
            "parallel.tp=1",
        )

    def ask(self) -> None:
        """Put three questions to the trained model, and show what it answers."""
        for question, image in report.shown_questions(self.out / "test.json", ASKED):
            asvr("chat", self._run("stage2"), "--image", image, "--question", question)

    def _run(self, name: str) -> str:
        return str(self.out / name)

    def _questions(self, split: str) -> list[str]:
        folder = self.out / "data"
        return ["--data", str(folder / f"{split}.json"), "--images", str(folder / "images")]

    def _asvr(
        self,
        name: str,
        *command: str,
        inputs: Sequence[str] = (),
        outputs: Sequence[Path] = (),
        continues: bool = False,
    ) -> Phase:
        """A phase that is one call of `asvr`."""
        return Phase(
            name=name,
            run=lambda: asvr(*command),
            inputs=[*command, *inputs],
            outputs=outputs,
            continues=continues,
        )


def asvr(*command: str) -> None:
    """Run one `asvr` command in a process of its own and show what it prints.

    The process dies with this one, so that what is left can be continued at once. Ctrl-C reaches
    both: a training then saves where it stands, and is waited for.
    """
    say("$ asvr " + " ".join(command))
    module = [sys.executable, "-m", "megatron_asvr.cli.main"]
    with subprocess.Popen([*module, *command], preexec_fn=die_with_parent) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
    if status:
        raise SystemExit(f"`asvr {command[0]}` ended with status {status}; its message is above")


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent is gone."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def code_of(module: object) -> str:
    """Hash of a module's source: a change of it is a change of its phase."""
    return hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def main() -> None:
    """Run every phase that is not done, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few images and steps, for CI")
    parser.add_argument("--out", type=Path, help="default: runs/quickstart[-short]")
    args = parser.parse_args()
    out = args.out or Path("runs/quickstart-short" if args.short else "runs/quickstart")
    start = QuickStart(out=out, short=Short() if args.short else None)
    phases = Phases(out / "phases", say)
    try:
        for phase in start.phases():
            phases.do(phase)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command continues") from None
    report.write(out, phases.results)
    say((out / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
