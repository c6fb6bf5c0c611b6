"""`asvr eval`: answer a set of questions and compare with the references."""

import argparse
import json
from pathlib import Path

from megatron_asvr.cli.common import add_overrides, run_config, start_ranks
from megatron_asvr.config.schema import SourceConfig


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("eval", help="accuracy of a run by greedy answers, exact match")
    parser.add_argument("model", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("--data", required=True, help="LLaVA-format JSON with the questions")
    parser.add_argument("--images", help="folder of its images (default: the JSON's)")
    parser.add_argument("--out", help="JSON file for accuracy and every answer")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluate, write the answers, print the accuracy."""
    from megatron_asvr.train.evaluate import Questions, evaluate_run

    config, world = run_config(args)
    questions = Questions(
        source=SourceConfig(path=args.data, images=args.images),
        limit=args.limit,
        max_new_tokens=args.max_new_tokens,
    )
    result = start_ranks(evaluate_run, (args.model, questions, args.overrides), config, world)
    if args.out:
        out = Path(args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(out.name + ".part")
        unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(out)
    print(
        f"accuracy {result['accuracy']:.4f} ({result['num_correct']} of "
        f"{result['num_questions']} questions) in {result['seconds']:.0f} s"
    )
