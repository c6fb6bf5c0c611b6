"""`asvr eval`: answer a set of questions and compare with the references."""

import argparse

from megatron_asvr.cli.common import (
    add_overrides,
    add_questions,
    positive,
    question_source,
    run_config,
    start_ranks,
    write_report,
)


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("eval", help="accuracy of a run by greedy answers, exact match")
    parser.add_argument("model", metavar="RUN", help="run folder or checkpoint")
    add_questions(parser)
    parser.add_argument(
        "--limit", type=positive, help="so many questions, spread evenly over all (default: all)"
    )
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluate, write the answers, print the accuracy."""
    from megatron_asvr.train.evaluate import Questions, evaluate_run

    config, world = run_config(args)
    questions = Questions(
        source=question_source(args),
        limit=args.limit,
        max_new_tokens=args.max_new_tokens,
    )
    result = start_ranks(evaluate_run, (args.model, questions, args.overrides), config, world)
    if result is None:
        return
    if args.out:
        write_report(args.out, result)
    print(
        f"accuracy {result['accuracy']:.4f} ({result['num_correct']} of "
        f"{result['num_questions']} questions) in {result['seconds']:.0f} s"
    )
