"""`asvr convert`: import weights, export a run to Hugging Face, and prove the export."""

import argparse
import json

from megatron_asvr.cli.common import (
    add_overrides,
    add_questions,
    positive,
    question_source,
    run_config,
    start_ranks,
    write_report,
)
from megatron_asvr.errors import ConversionError


def add(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser("convert", help="from and to Hugging Face, and the proof of it")
    parser.set_defaults(takes_overrides=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_import(actions.add_parser("import", help="weights from elsewhere, for init.all"))
    export = actions.add_parser("export", help="write a stock folder of transformers")
    export.add_argument("model", metavar="RUN", help="run folder or checkpoint")
    export.add_argument("--out", required=True, help="folder to write; must not exist")
    export.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    export.add_argument(
        "--kind",
        choices=("llava", "text"),
        default="llava",
        help="LlavaForConditionalGeneration (default), or the language model alone",
    )
    export.set_defaults(run=run_export)
    verify = actions.add_parser("verify", help="compare an export with its run on real images")
    verify.add_argument("model", metavar="RUN", help="run folder or checkpoint")
    verify.add_argument("folder", help="the exported folder")
    add_questions(verify)
    verify.add_argument("--samples", type=positive, default=16, help="questions to compare")
    add_overrides(verify)
    verify.set_defaults(run=run_verify)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="folder of weights")
    parser.add_argument("--out", required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--allow-missing",
        metavar="PATTERN",
        action="append",
        default=[],
        help="our names that the source may lack, such as 'vision_encoder.*'; may be repeated",
    )
    parser.add_argument(
        "--from",
        dest="format",
        choices=("hf", "asvr-official", "dualtoken"),
        default="hf",
        help="Hugging Face (default), the official ASVR code, or a residual-VQ tokenizer alone",
    )
    parser.epilog = "What an official checkpoint does not tell is given as model.vision.num_heads=N"
    parser.set_defaults(run=run_import, takes_overrides=True)


def run_import(args: argparse.Namespace) -> None:
    """Import weights; print what came and what did not."""
    from megatron_asvr.hf.run import import_tokenizer, import_weights

    if args.format == "dualtoken":
        fingerprint = import_tokenizer(args.source, args.out, overrides=args.overrides)
        print(f"wrote {args.out}: visual tokenizer {fingerprint[:16]}")
        return
    report = import_weights(
        args.source,
        args.out,
        format=args.format,
        overrides=args.overrides,
        allow_missing=args.allow_missing,
    )
    print(
        f"wrote {args.out}: {report['num_tensors']} tensors, {report['num_bytes']:,} bytes of "
        f"{', '.join(report['parts'])}"
    )
    for what, why in (("ignored", "not needed"), ("missing", "allowed; drawn from run.seed")):
        names = report[what]
        if names:
            print(f"{what} ({why}): {len(names)} tensors, e.g. {', '.join(names[:3])}")


def run_export(args: argparse.Namespace) -> None:
    """Export a run's newest checkpoint."""
    from megatron_asvr.hf.run import export_run

    print(f"wrote {export_run(args.model, args.out, dtype=args.dtype, kind=args.kind)}")


def run_verify(args: argparse.Namespace) -> None:
    """Print the report of the comparison; fail when it found a difference."""
    from megatron_asvr.train.evaluate import Questions, verify_run

    config, world = run_config(args)
    questions = Questions(
        source=question_source(args),
        limit=args.samples,
        max_new_tokens=args.max_new_tokens,
    )
    request = (args.model, args.folder, questions, args.overrides)
    report = start_ranks(verify_run, request, config, world)
    if report is None:
        return
    if args.out:
        write_report(args.out, report)
    print(json.dumps(report, indent=2))
    if not report["ok"]:
        raise ConversionError(
            f"{args.folder} does not behave as {args.model}: {report['num_mismatches']} "
            f"mismatches, the first: {report['mismatches'][0]}"
        )
