"""`asvr chat`: ask a trained model about images, each question alone."""

import argparse
import sys

from megatron_asvr.cli.common import add_overrides, positive, run_config, start_ranks
from megatron_asvr.errors import ConfigError


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("chat", help="ask a trained model about an image")
    parser.add_argument("model", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("--image", action="append", default=[], help="image file; may be repeated")
    parser.add_argument(
        "--question",
        action="append",
        help="question, may be repeated: each is asked alone (default: lines of standard input)",
    )
    parser.add_argument("--max-new-tokens", type=positive, default=64)
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print an answer for every question."""
    from megatron_asvr.train.evaluate import ask

    config, world = run_config(args)
    questions = args.question or read_questions()
    if not questions:
        raise ConfigError("there is no question; give --question TEXT, or lines of standard input")
    answers = start_ranks(
        ask,
        (args.model, questions, args.image, args.overrides, args.max_new_tokens),
        config,
        world,
    )
    if answers is None:
        return
    for question, answer in zip(questions, answers, strict=True):
        print(f"Q: {question}\nA: {answer}")


def read_questions() -> list[str]:
    """The lines of standard input up to its end or, from a terminal, to an empty line."""
    if not sys.stdin.isatty():
        return [line.strip() for line in sys.stdin if line.strip()]
    print("Questions, one a line; an empty line asks them:", file=sys.stderr)
    questions: list[str] = []
    while line := sys.stdin.readline().strip():
        questions.append(line)
    return questions
