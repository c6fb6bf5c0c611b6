"""Does a layout compute what one rank computes? Asked of a user's own model and samples.

One step is measured twice, on one rank and in the layout, each by ranks of its own: losses, counts,
the gradient of every parameter, and the outputs of modules (probes.py). ``judge`` compares the two.
Nothing is trained, and the run's folder is not touched.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_asvr.platforms import mcore  # noqa: F401  (prepares the process)

from megatron_asvr.checkpoint.identity import identity
from megatron_asvr.config.check import check
from megatron_asvr.config.schema import Config, InitConfig, ParallelConfig, PrecisionConfig
from megatron_asvr.errors import ConfigError, LaunchError
from megatron_asvr.model import sharding
from megatron_asvr.model.asvr import AsvrModel, build_chunks
from megatron_asvr.model.loss import read_totals
from megatron_asvr.parallel import record
from megatron_asvr.parallel.collectives import gather_objects
from megatron_asvr.parallel.groups import Groups
from megatron_asvr.parallel.plan import make_plan
from megatron_asvr.train import probes
from megatron_asvr.train.assemble import Data, codebook_sizes, make_groups, open_data
from megatron_asvr.train.caches import fill_caches
from megatron_asvr.train.excerpt import make_excerpt
from megatron_asvr.train.optim import make_optimizer, wrap
from megatron_asvr.train.passes import backward, balancing
from megatron_asvr.train.shrink import shrink
from megatron_asvr.train.step import agree, loss_function, reduce_gradients, train_step
from megatron_asvr.train.verdict import Facts, Measurement, Verdict, judge, plain, save_gradient
from megatron_asvr.train.weight_sources import load_sources

MICRO_BATCHES = 2  # of each data-parallel rank, at least

Start = Callable[[Callable[..., Facts], Sequence[Any], int], Facts]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is to be certified.

    Attributes:
        config: the user's run; its ``parallel`` settings are the layout's.
        dp: data-parallel ranks of the layout.
        samples: of the global batch; None takes a few micro-batches.
        precision: of the computation; decides the tolerances.
        shrink: a small model of the same structure, with weights from the seed.
        prepare: compute missing codes into the run's cache.
        collectives: compare the schedules of collectives over ranks too.
    """

    config: Config
    dp: int
    samples: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    shrink: bool = False
    prepare: bool = False
    collectives: bool = False

    @property
    def world(self) -> int:
        """Ranks of the layout."""
        p = self.config.parallel
        return p.tp * p.pp * p.cp * self.dp


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """The verdict and what it is about.

    Attributes:
        verdict: of the comparison.
        request: what was asked for.
        samples: ids of the samples.
        replaced: bad images whose records were left out, with the reasons.
    """

    verdict: Verdict
    request: Request
    samples: Sequence[str]
    replaced: dict[str, str]

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        request = self.request
        return plain(
            {
                "ok": self.verdict.ok,
                "layout": {**asdict(request.config.parallel), "dp": request.dp},
                "precision": request.precision,
                "shrunk": request.shrink,
                "samples": self.samples,
                "replaced": self.replaced,
                "rows": [asdict(row) for row in self.verdict.rows],
                "worst_gradients": dict(self.verdict.worst),
                "places": self.verdict.places,
            }
        )


def certify(request: Request, start: Start) -> Certificate:
    """Whether the layout computes what one rank computes.

    Args:
        request: what is to be certified.
        start: runs a function with arguments in so many ranks, and returns rank 0's result.

    Raises:
        ConfigError: the layout cannot work, or inputs are missing: all of them are named.
        LaunchError: a rank failed.
    """
    config = check(_one_step(request), request.world)
    with tempfile.TemporaryDirectory(prefix="asvr-certify-") as name:
        folder = Path(name)
        excerpt = make_excerpt(config, folder, prepare=request.prepare)
        config = excerpt.config
        if request.shrink:
            config = _small(config, request.world)
        runs = []
        for kind, parallel, world in (
            ("reference", ParallelConfig(), 1),
            ("layout", config.parallel, request.world),
        ):
            (folder / kind).mkdir()
            run = replace(config, parallel=parallel)
            args = (run, str(folder / kind), excerpt.samples, request.collectives)
            runs.append(_measured(start, args, world))
        verdict = judge(*runs, precision=request.precision, samples=excerpt.samples)
    return Certificate(
        verdict=verdict, request=request, samples=excerpt.samples, replaced=excerpt.replaced
    )


def _one_step(request: Request) -> Config:
    """The run with one step of the wanted size and precision."""
    config = request.config
    p, t = config.parallel, config.train
    share = request.dp * t.micro_batch
    samples = request.samples or share * max(MICRO_BATCHES, p.pp) * (
        2 if config.data.packing else 1
    )
    if samples % share and not config.data.packing:
        raise ConfigError(
            f"--samples={samples} is not a multiple of dp={request.dp} x "
            f"train.micro_batch={t.micro_batch}; use a multiple of {share}"
        )
    return replace(
        config,
        init=InitConfig() if request.shrink else config.init,
        # Ranks round their own parts to 8 bits: layouts would differ by more than is compared.
        precision=PrecisionConfig(backend=config.precision.backend),
        train=replace(
            t,
            steps=1,
            epochs=None,
            global_batch=samples,
            precision=request.precision,
            # The norm is computed for clipping only.
            optim=replace(t.optim, clip_grad=t.optim.clip_grad or 1.0),
        ),
    )


def _small(config: Config, world: int) -> Config:
    """The shrunk run, whose pipeline stages are as uneven as the large one's."""
    if config.parallel.pp > 1:
        plan = make_plan(config, world, codebook_sizes(config))
        stages = replace(config.parallel, stages=plan.stages, head_alone=plan.head_alone)
        config = replace(config, parallel=stages)
    return check(shrink(config), world)


def _measured(
    start: Start, args: tuple[Config, str, Sequence[str], bool], world: int
) -> Measurement:
    """``measure`` in so many ranks, and the comparison of their schedules."""
    folder, collectives = Path(args[1]), args[3]
    try:
        facts = start(measure, args, world)
    except LaunchError as error:
        found = record.compare_schedules(_schedules(folder, world))
        if error.__cause__ is not None or not found:
            raise
        raise LaunchError(f"{error}\nup to here the collectives differ: {found[0]}") from None
    if collectives:
        schedules = _schedules(folder, world)
        found = record.compare_schedules(schedules)
        facts = replace(facts, collectives=found, num_collectives=sum(map(len, schedules)))
    return Measurement(facts=facts, folder=folder)


def measure(config: Config, folder: str, samples: Sequence[str], collectives: bool) -> Facts:
    """What one step computes; gradients and probes go to ``folder``. Call it on every rank.

    Args:
        config: a run of one step.
        folder: of this measurement, on storage that all ranks share.
        samples: ids of the global batch.
        collectives: record the schedule of collectives of the step.
    """
    groups = make_groups(config)
    with contextlib.closing(open_data(config, groups=groups)) as data:
        chunks = _model(config, data, groups)
        wrapped = wrap(chunks, config.train.optim)
        optimizer = make_optimizer(wrapped, config.train)
        batches = data.train.step(0)
        agreement = agree(batches, stop=False, groups=groups)
        loss = loss_function(config.loss, agreement, num_micro_batches=len(batches))
        with (
            # Before the recorder: its counting pass is not one of the step's.
            balancing(wrapped, batches, loss, groups=groups),
            probes.Recorder(chunks=chunks, groups=groups, samples=samples) as recorder,
            _completed(chunks) as parameters,
        ):
            backward(wrapped, batches, loss)
        reduce_gradients(wrapped, groups=groups, whole=True)
        recorder.save(Path(folder) / f"{groups.rank}.probes")
        _save_gradients(chunks, Path(folder), groups)
        path = Path(folder) / f"{groups.rank}.schedule"
        with _recorded(path) if collectives else contextlib.nullcontext():
            result = train_step(wrapped, optimizer, batches, loss, step=0, groups=groups)
    used = {"text": agreement.text_count, "visual": agreement.visual_count}
    divisors = gather_objects((_who(groups), used), group=groups.world)
    losses = read_totals(result.totals)
    kinds = [kind for kind in used if f"{kind}_loss" in losses]
    return Facts(
        losses={"loss": result.loss, **{f"{kind} loss": losses[f"{kind}_loss"] for kind in kinds}},
        targets={kind: int(losses[f"{kind}_targets"]) for kind in kinds},
        grad_norm=result.grad_norm,
        divisors=divisors,
        parameters=list(parameters),
    )


def _model(config: Config, data: Data, groups: Groups) -> list[AsvrModel]:
    """The model with its first weights, and the codes of its images."""
    chunks = build_chunks(config, groups=groups, tokenizer=data.tokenizer)
    fingerprint = data.tokenizer.fingerprint if data.tokenizer is not None else None
    facts = identity(config, tokenizer_fingerprint=fingerprint, image_keys=data.train.image_keys())
    load_sources(chunks, config, facts=facts, groups=groups)
    fill_caches(data, groups=groups)
    return chunks


@contextlib.contextmanager
def _completed(chunks: Sequence[AsvrModel]) -> Iterator[dict[str, None]]:
    """The trained parameters, in the order in which the backward passes inside complete them."""
    order: dict[str, None] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda *_: order.setdefault(name)

    # Hooks of the nodes: those of the parameters miss gradients that went to the buffers before.
    nodes = {
        name: parameter.expand_as(parameter).grad_fn.next_functions[0][0]
        for name, parameter in sharding.named(chunks)
        if parameter.requires_grad
    }
    handles = [node.register_hook(note(name)) for name, node in nodes.items()]
    yield order
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def _recorded(path: Path) -> Iterator[None]:
    """Write what this rank asks of the others inside, also when it waits in vain."""
    recorder = record.Recorder()
    try:
        with recorder:
            yield
    finally:
        path.write_text(json.dumps([asdict(entry) for entry in recorder.entries]), encoding="utf-8")


def _schedules(folder: Path, world: int) -> list[list[record.Entry]]:
    """What ``_recorded`` wrote on all ranks; nothing where a rank could not."""
    paths = [folder / f"{rank}.schedule" for rank in range(world)]
    if not all(path.exists() for path in paths):
        return []
    return [
        [
            record.Entry(
                **{**raw, "ranks": tuple(raw["ranks"]), "sizes": tuple(map(tuple, raw["sizes"]))}
            )
            for raw in json.loads(path.read_text(encoding="utf-8"))
        ]
        for path in paths
    ]


def _save_gradients(chunks: Sequence[AsvrModel], folder: Path, groups: Groups) -> None:
    """Write the full gradient of every trained parameter, one after the other."""
    state = sharding.full_state(
        chunks, groups=groups, only=lambda _, p: p.requires_grad, of=lambda p: p.main_grad
    )
    for name, gradient in state:
        if groups.rank == 0:
            save_gradient(folder, name, gradient)


def _who(groups: Groups) -> str:
    """This rank and its place in the layout."""
    places = {
        "tp": groups.tp_rank,
        "pp": groups.pp_rank,
        "cp": groups.cp_rank,
        "dp": groups.dp_rank,
    }
    named = ", ".join(f"{name} {rank}" for name, rank in places.items())
    return f"rank {groups.rank} ({named})"
