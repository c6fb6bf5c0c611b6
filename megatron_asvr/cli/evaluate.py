"""`asvr eval`: answer a set of questions and compare with the references, or run a suite."""

import argparse

from megatron_asvr.cli.common import (
    NEW_TOKENS,
    add_overrides,
    add_questions,
    positive,
    question_source,
    run_config,
    start_ranks,
    write_report,
)
from megatron_asvr.config.schema import Config
from megatron_asvr.errors import ConfigError

BATCH = 8


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "eval", help="accuracy of a run by greedy answers, or an export on a suite of benchmarks"
    )
    parser.add_argument("model", metavar="RUN", help="run folder, checkpoint; --suite: HF folder")
    add_questions(parser)
    parser.add_argument(
        "--limit", type=positive, help="so many questions, spread evenly over all (default: all)"
    )
    suite = parser.add_argument_group(
        "suite",
        "--data and --out are folders then, --limit takes the first of each benchmark, and the "
        "longest answer is that of the task",
    )
    suite.add_argument("--suite", choices=("asvr14",), help="the paper's benchmarks by lmms-eval")
    suite.add_argument("--baseline", help="results.json of another model, to compare with")
    suite.add_argument(
        "--batch", type=positive, help=f"questions answered together (default: {BATCH})"
    )
    suite.add_argument("--dry-run", action="store_true", help="list what is there, ask nothing")
    add_overrides(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Evaluate, write the answers, print the accuracy; or do so for a suite."""
    if args.suite:
        run_suite(args)
        return
    for name in ("baseline", "batch", "dry_run"):
        if getattr(args, name):
            raise ConfigError(f"--{name.replace('_', '-')} belongs to --suite asvr14")
    from megatron_asvr.train.evaluate import Questions, evaluate_run

    config, world = run_config(args)
    questions = Questions(
        source=question_source(args),
        limit=args.limit,
        max_new_tokens=args.max_new_tokens or NEW_TOKENS,
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


def run_suite(args: argparse.Namespace) -> None:
    """List the benchmarks, or ask all that have data and print the table."""
    from megatron_asvr.hf.suite.report import plan_table, read, table
    from megatron_asvr.launch.job import place
    from megatron_asvr.train.suite import RESULTS, SuiteRun, evaluate_suite, plan

    if args.images or args.overrides:
        given = "--images" if args.images else args.overrides[0]
        raise ConfigError(f"{given} does not belong to --suite; everything is in --data")
    if args.dry_run:
        print("\n".join(plan_table(plan(args.data))))
        return
    if not args.out:
        raise ConfigError("--suite wants --out FOLDER, where answers are recorded as they come")
    suite = SuiteRun(
        model=args.model,
        data=args.data,
        out=args.out,
        limit=args.limit,
        batch=args.batch or BATCH,
        max_new_tokens=args.max_new_tokens,
        baseline=args.baseline,
    )
    here = place()
    world = here.world_size if here else args.ranks or 1
    report = start_ranks(evaluate_suite, (suite,), Config(), world)
    if report is not None:
        print("\n".join(table(report, read(args.baseline) if args.baseline else None)))
        print(f"results: {args.out}/{RESULTS}")
