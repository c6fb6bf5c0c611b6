"""What a job will be: its checks, its script's contents, and what it needs and makes."""

import argparse
import dataclasses
import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_asvr.cli.common import plan_lines
from megatron_asvr.config.check import check
from megatron_asvr.config.layout import data_parallel
from megatron_asvr.config.load import load
from megatron_asvr.config.schema import Config
from megatron_asvr.data.cache import cache_root
from megatron_asvr.data.index import index_folder, open_index
from megatron_asvr.errors import ConfigError, LaunchError
from megatron_asvr.launch import inputs
from megatron_asvr.launch.elastic import start_nodes, usable_nodes
from megatron_asvr.launch.script import CONFIG, Container, Job, Resources, time_s
from megatron_asvr.parallel.plan import layout_lines

RESOURCES = ("gpus_per_node", "ranks_per_node", "cpus_per_rank", "time", "partition", "account")
FOLDER = "slurm"  # of a run's job, in the run's folder
SHOWN = (
    *("layout:", "stage ", "imbalance ", "bubble:", "micro-batches:"),
    *("data:", "data ", "evaluation:"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A job that was checked.

    Attributes:
        job: what to submit.
        configs: resolved configurations by the file they go to.
        steps: optimizer steps of a run, where they are known.
        makes: paths that it makes.
        notes: what a person should know of it.
        lacks: inputs that nobody makes, by name.
    """

    job: Job
    configs: Mapping[Path, Config] = dataclasses.field(default_factory=dict)
    steps: int | None = None
    makes: Sequence[str] = ()
    notes: Sequence[str] = ()
    lacks: Mapping[str, str] = dataclasses.field(default_factory=dict)


def plan(args: argparse.Namespace, made: Mapping[str, str]) -> Planned:
    """The job that some arguments describe, checked as far as its inputs are there.

    Args:
        args: of `submit`.
        made: what jobs before it make: who, by path.

    Raises:
        ConfigError, DataError, LaunchError: it could not run.
    """
    from megatron_asvr.cli.main import COMMANDS, parse

    names = {module.__name__.rpartition(".")[2].replace("evaluate", "eval") for module in COMMANDS}
    words = [*args.what, *args.overrides]
    command = parse(words if words[0] in names else ["train", *words])
    if command.command in ("slurm", "chat", "plan") or getattr(command, "dry_run", False):
        raise LaunchError(f"`asvr {shlex.join(words)}` is nothing for a job; call it here")
    if command.command == "train":
        return _plan_training(args, command, made)
    if args.sweep:
        raise LaunchError("--sweep is for a run's configuration, not for a command")
    if args.job_dir is None:
        raise LaunchError(f"`{words[0]}` needs --job-dir, a folder for its script and logs")
    return _plan_command(args, command, words, made)


def _plan_training(
    args: argparse.Namespace, command: argparse.Namespace, made: Mapping[str, str]
) -> Planned:
    resources, runs = _resources(args), list(_sweep(args.sweep))
    root = Path(load(command.config, command.overrides).run.dir).absolute()
    folder, configs, notes = root / FOLDER, {}, []
    usable: set[int] | None = None
    lacks: dict[str, str] = {}
    for number, values in enumerate(runs):
        place = root / str(number) if args.sweep else root
        config = load(command.config, [*command.overrides, *values, f"run.dir={json_of(place)}"])
        fits = _require_work(config, resources)
        usable = set(fits) if usable is None else usable & set(fits)
        pending = _awaited(inputs.read_by_run(config), made)
        steps, lines = _look_into(config, start_world(resources, fits), bool(pending), made)
        said, without = _tell_pending(pending, made)
        if args.sweep:
            notes.append(f"{place}: {' '.join(values)}")
        notes += lines + said if number == 0 else []
        lacks |= without
        configs[(folder / str(number) if args.sweep else folder) / "config.yaml"] = config
    made_job = _job(args, resources, ["train", CONFIG], folder, read=_paths(config))
    looks = [*made_job.command[:-2], "preflight", CONFIG]
    job = dataclasses.replace(
        made_job,
        preflight=() if args.no_preflight else looks,
        name=args.name or root.name,
        purpose=f"asvr train {shlex.join([command.config, *command.overrides])}",
        usable=tuple(sorted(usable or ())),
        array=len(runs) if args.sweep else None,
    )
    notes += [f"warning: {line}" for line in _crossing(config, resources)]
    return Planned(
        job=job, configs=configs, steps=steps, makes=[str(root)], notes=notes, lacks=lacks
    )


def _plan_command(
    args: argparse.Namespace,
    command: argparse.Namespace,
    words: Sequence[str],
    made: Mapping[str, str],
) -> Planned:
    resources = _resources(args)
    ranked = hasattr(command, "ranks") or command.command == "preflight"
    alone = not ranked or getattr(command, "verify", "") == "weights"
    if alone and (resources.nodes > 1 or (args.ranks_per_node or 1) > 1):
        raise LaunchError(
            f"`{shlex.join(words)}` is one process; leave out --nodes and --ranks-per-node"
        )
    if alone:
        resources = dataclasses.replace(resources, ranks_per_node=1)
        words = _with_workers(command, words, resources)
    elif getattr(command, "ranks", None) not in (None, 1):
        raise LaunchError(f"--ranks={command.ranks}: the ranks of a job are nodes x ranks-per-node")
    read, makes = inputs.read_by_command(command), inputs.written_by_command(command)
    if getattr(command, "config", None) is not None:
        config = check(load(command.config, command.overrides), None if alone else resources.world)
        read = inputs.read_by_run(config, weights=command.command not in ("data", "tokenizer"))
        if command.command == "tokenizer":
            makes = [str(cache_root(config))]
        elif command.command == "data" and command.action == "index":
            read.pop("model.visual_tokenizer", None)
            parts = (part for part in (config.data.train, config.data.eval) if part)
            makes = [str(index_folder(config, part)) for part in parts]
    pending = _awaited(read, made)
    if (
        hasattr(command, "model")
        and not alone
        and not pending
        and not getattr(command, "suite", None)
    ):
        from megatron_asvr.train.inference import inference_config

        of_run = inference_config(command.model, command.overrides)
        data_parallel(of_run.parallel, resources.world)
    said, lacks = _tell_pending(pending, made)
    job = _job(args, resources, words, Path(args.job_dir), read=[*read.values(), *makes])
    if alone:  # not a rank: it may start processes of its own
        job = dataclasses.replace(job, command=["env", "--unset=SLURM_PROCID", *job.command])
    return Planned(job=job, makes=makes, notes=said, lacks=lacks)


def _with_workers(
    command: argparse.Namespace, words: Sequence[str], resources: Resources
) -> list[str]:
    """The words with as many worker processes as the job has CPUs."""
    if getattr(command, "workers", 0) is not None:
        return list(words)
    return [*words, "--workers", str(resources.cpus_per_rank)]


def _paths(config: Config) -> list[str]:
    """Every path that a run reads or writes."""
    return [*inputs.read_by_run(config).values(), config.run.dir, str(cache_root(config))]


def _resources(args: argparse.Namespace) -> Resources:
    limit = time_s(args.time or "")
    if limit and args.warning_s >= limit:
        raise LaunchError(
            f"--warning={args.warning_s}: ranks would be told to save before they start, for "
            f"--time={args.time} is {limit} s; give a longer --time or a shorter --warning"
        )
    return Resources(
        **{name: getattr(args, name) for name in RESOURCES},
        min_nodes=args.nodes[0],
        nodes=args.nodes[1],
        warning_s=args.warning_s,
        more=tuple(args.sbatch),
    )


def _job(
    args: argparse.Namespace,
    resources: Resources,
    words: Sequence[str],
    folder: Path,
    *,
    read: Sequence[str],
) -> Job:
    container, workdir = None, Path.cwd()
    if args.container is not None:
        places = inputs.folders([str(workdir / "x"), str(folder.absolute() / "x"), *read])
        apart = " ,:" if args.container_runtime == "pyxis" else ",:"
        if odd := [place for place in places if set(place) & set(apart)]:
            raise LaunchError(
                f"{odd[0]!r} cannot be mounted: {args.container_runtime} takes none of {apart!r} "
                "in a path; use another folder, or a link to it"
            )
        container = Container(
            image=_image(args.container, args.container_runtime),
            runtime=args.container_runtime,
            mounts=(*(f"{place}:{place}" for place in places), *args.mount),
        )
    pairs = [text.partition("=") for text in args.env]
    return Job(
        name=args.name or words[0],
        purpose=f"asvr {shlex.join(words)}",
        command=["python" if container else sys.executable, "-m", "megatron_asvr", *words],
        folder=folder.absolute(),
        workdir=workdir,
        resources=resources,
        container=container,
        max_stops=args.max_stops,
        max_crashes=args.max_crashes,
        environment={"PYTHONUNBUFFERED": "1"} | {name: value for name, _, value in pairs},
    )


def _image(name: str, runtime: str) -> str:
    """An image as its runtime takes it: pyxis asks a registry for what does not begin with ``/``.

    Raises:
        LaunchError: it is a file that is not there.
    """
    path = Path(name)
    if path.is_file() or (runtime == "apptainer" and path.is_dir()):
        return str(path.absolute())
    if "://" not in name and (
        runtime == "apptainer" or name.startswith(("/", ".")) or path.suffix in (".sqsh", ".sif")
    ):
        raise LaunchError(
            f"--container {name}: there is no such file; wanted one that all nodes see, or the "
            "name of an image in a registry (apptainer: docker://NAME)"
        )
    return name


def json_of(value: object) -> str:
    """A value as a setting takes it: JSON, which is YAML too."""
    return json.dumps(str(value) if isinstance(value, Path) else value)


def _sweep(settings: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Settings of every run of a sweep; one run without any when there is none."""
    axes = []
    for text in settings:
        name, mark, values = text.partition("=")
        try:
            found = yaml.safe_load(f"[{values}]") if mark and values else []
        except yaml.YAMLError:
            found = []
        if not found:
            raise ConfigError(f"--sweep {text!r}: wanted a setting and its values, a.b=1,2")
        axes.append([f"{name}={json_of(value)}" for value in found])
    return itertools.product(*axes)


def start_world(resources: Resources, fits: Sequence[int]) -> int:
    """Ranks that a run starts with when its job gets all nodes."""
    nodes = resources.nodes
    if resources.min_nodes is not None:
        nodes = start_nodes(fits, resources.min_nodes, nodes)
    return nodes * resources.ranks_a_node


def _require_work(config: Config, resources: Resources) -> tuple[int, ...]:
    """Numbers of nodes that a run can use, when the wanted one is among them.

    Raises:
        ConfigError: a setting cannot work; or the samples of a batch do not go round.
    """
    check(config)
    p, t, ranks = config.parallel, config.train, resources.ranks_a_node
    fits = usable_nodes(config, ranks)
    world = start_world(resources, fits)
    dp = world // (p.tp * p.pp * p.cp)
    share, batch = dp * t.micro_batch, t.global_batch
    uneven = batch % share if share and not config.data.packing else 0
    if share > batch or uneven:
        larger = -(-batch // share) * share
        why = "more than" if share > batch else "which does not divide"
        most = f"With {ranks} ranks a node that is so on any number of nodes"
        if fits:
            numbers = ", ".join(str(n) for n in fits[-8:])
            most = f"The largest useful number of nodes is {fits[-1]} (that fit: {numbers})"
        raise ConfigError(
            f"{world // ranks} nodes x {ranks} ranks are {dp} data-parallel replicas, which take "
            f"{share} samples at a time (micro-batch {t.micro_batch}), {why} "
            f"train.global_batch={batch}. {most}. Or take a larger batch and, "
            "by the square-root rule for Adam (lr x sqrt of the factor; arXiv 2205.10287), "
            f"train.global_batch={larger} train.optim.lr={t.optim.lr * (larger / batch) ** 0.5:.3g}"
        )
    check(config, world)
    return fits


def _look_into(
    config: Config, world: int, pending: bool, made: Mapping[str, str]
) -> tuple[int | None, list[str]]:
    """Optimizer steps and plan of a run; without its inputs, what can be known."""
    if pending:
        return config.train.steps, layout_lines(config, world, ())
    from megatron_asvr.data.loader import Loader
    from megatron_asvr.data.text import TextTokenizer

    lines = [line for line in plan_lines(config, world) if line.startswith(SHOWN)]
    text = TextTokenizer(str(config.model.text_tokenizer))
    coming = inputs.maker(str(index_folder(config, config.data.train)), made)
    if coming is None and open_index(config, config.data.train, text) is None:
        lines.append("data.train has no index: every start looks at all images first")
    with Loader(config, text, split="train") as data:
        return data.total_steps, lines


def _awaited(read: Mapping[str, str], made: Mapping[str, str]) -> dict[str, str]:
    """Inputs that are not there, or come from a job before: a run has a folder before weights."""
    others = {place: who for place, who in made.items() if place != "/"}
    models = {
        name: path
        for name, path in read.items()
        if name.startswith(("init.", "model")) and inputs.maker(path, others) is not None
    }
    return inputs.missing(read) | models


def _tell_pending(
    pending: Mapping[str, str], made: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Lines on inputs that a job before makes, and the inputs that none does."""
    makers = {name: inputs.maker(path, made) for name, path in pending.items()}
    said = [
        f"not looked into: {name}={pending[name]} comes from {who}"
        for name, who in makers.items()
        if who is not None
    ]
    return said, {name: path for name, path in pending.items() if makers[name] is None}


def _crossing(config: Config, resources: Resources) -> Iterator[str]:
    if resources.ranks_a_node % config.parallel.tp and resources.world > resources.ranks_a_node:
        yield (
            f"parallel.tp={config.parallel.tp} crosses nodes of {resources.ranks_a_node} ranks; "
            "its collectives are in every layer and belong inside one node"
        )
