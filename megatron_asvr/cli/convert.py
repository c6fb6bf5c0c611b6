"""`asvr convert`: import weights, export a run to Hugging Face, and prove the export."""

import argparse
import json
from typing import Any

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
from megatron_asvr.errors import ConversionError

SAMPLES = 16


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
        help="LLaVA, or LLaVA-NeXT of any resolution (default), or the language model alone",
    )
    export.add_argument(
        "--no-verify", action="store_true", help="do not compare what was written with the run"
    )
    export.set_defaults(run=run_export)
    _add_verify(actions.add_parser("verify", help="prove that a folder holds what it came from"))


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="RUN", help="run folder or checkpoint; of an import, its source"
    )
    parser.add_argument("folder", help="the folder that an export or an import wrote")
    parser.add_argument(
        "--verify",
        choices=("weights", "full"),
        default="weights",
        help="compare every byte of the weights (default), or also logits and greedy answers with "
        "those of transformers on the images of --data",
    )
    add_questions(parser, required=False)
    parser.add_argument(
        "--samples", type=positive, help=f"questions to compare (default: {SAMPLES})"
    )
    add_overrides(parser)
    parser.set_defaults(run=run_verify)


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
        choices=("hf", "asvr-official", "dualtoken", "megatron-lm"),
        default="hf",
        help="Hugging Face (default), the official ASVR code, a residual-VQ tokenizer alone, or a "
        "torch_dist checkpoint of Megatron-LM's GPTModel",
    )
    parser.add_argument(
        "--masters", action="store_true", help="Megatron-LM: take the optimizer's fp32 weights"
    )
    parser.epilog = (
        "What a checkpoint does not tell is given as model.vision.num_heads=N or "
        "model.language.vocab_size=N"
    )
    parser.set_defaults(run=run_import, takes_overrides=True)


def run_import(args: argparse.Namespace) -> None:
    """Import weights; print what came and what did not."""
    from megatron_asvr.hf.run import import_tokenizer, import_weights

    if args.format == "dualtoken":
        if args.allow_missing:
            raise ConversionError(
                f"--allow-missing {args.allow_missing[0]}: a tokenizer alone is complete, or its "
                "codes would be others; leave the option out"
            )
        fingerprint = import_tokenizer(args.source, args.out, overrides=args.overrides)
        print(f"wrote {args.out}: visual tokenizer {fingerprint[:16]}")
        return
    report = import_weights(
        args.source,
        args.out,
        format=args.format,
        overrides=args.overrides,
        allow_missing=args.allow_missing,
        masters=args.masters,
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

    report = export_run(
        args.model, args.out, dtype=args.dtype, kind=args.kind, verify=not args.no_verify
    )
    proof = "not verified"
    if report is not None:
        number, size = report["num_tensors_equal"], report["num_bytes_compared"]
        proof = f"verified, {number} tensors with {size:,} bytes equal those of {args.model}"
    print(f"wrote {args.out}: {proof}")


def run_verify(args: argparse.Namespace) -> None:
    """Print the report of the comparison; fail when it found a difference."""
    from megatron_asvr.hf.run import kind_of, verify_weights
    from megatron_asvr.launch.job import place

    full = args.verify == "full"
    if full != (args.data is not None):
        raise ConversionError(
            "--data is what --verify full asks about: give both to compare logits and answers, or "
            "neither to compare the weights"
        )
    for name in ("images", "samples", "max_new_tokens", "ranks"):
        if getattr(args, name) is not None and not full:
            raise ConversionError(f"--{name.replace('_', '-')} belongs to --verify full")
    if full and kind_of(args.folder) == "import":
        raise ConversionError(
            f"{args.folder} is an import, which answers nothing by itself; without --verify full "
            "and --data, its weights are compared"
        )
    here = place()
    report = None
    if here is None or here.rank == 0:
        overrides = () if full else args.overrides
        report = verify_weights(args.model, args.folder, overrides=overrides)
    if full and (report is None or report["ok"]):
        behaviour = _behaviour(args)
        report = None if behaviour is None else behaviour | {"weights": report}
    if report is None:  # on the other ranks of a launched job
        return
    if args.out:
        write_report(args.out, report)
    print(json.dumps(report, indent=2))
    if not report["ok"]:
        raise ConversionError(
            f"{args.folder} does not hold what {args.model} does: {report['num_mismatches']} "
            f"mismatches, the first: {report['mismatches'][0]}"
        )


def _behaviour(args: argparse.Namespace) -> dict[str, Any] | None:
    """The comparison of logits and answers, on the ranks of the run's layout."""
    from megatron_asvr.train.evaluate import Questions, verify_run

    config, world = run_config(args)
    questions = Questions(
        source=question_source(args),
        limit=args.samples or SAMPLES,
        max_new_tokens=args.max_new_tokens or NEW_TOKENS,
    )
    return start_ranks(
        verify_run, (args.model, args.folder, questions, args.overrides), config, world
    )
