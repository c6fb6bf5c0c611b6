"""All probes of the ledger, one after another, each in a process of its own.

A probe that fails, dies or hangs is reported, and the next one starts. On a machine without the
GPUs that a probe needs it is not run, which never counts as passed.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_asvr.platforms import select
from megatron_asvr.platforms.ledger import ROWS

Level = Literal["host", "gpu", "node", "nodes"]
State = Literal["PASS", "FAIL", "NOT RUN"]
LEVELS: dict[Level, int] = {"host": 0, "gpu": 1, "node": 2, "nodes": 1}  # GPUs of a node needed
TIMEOUT_S = 300.0
_KEPT = 2000  # characters of a failed probe's last words in the bundle


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """How a probe of the ledger is run.

    Attributes:
        level: what it needs.
        action: what to do next when it fails.
        of_run: it looks at the user's run.
        short: a preflight runs it on every GPU.
    """

    level: Level
    action: str
    of_run: bool = False
    short: bool = False


_TE = "compare `asvr env`; precision.backend=local goes without Transformer Engine"
_LAYOUT = "the first tensor that differs is named by `asvr certify CONFIG --layout "
_TORCH = "compare `asvr env`: torch's build, CUDA and the driver have to fit"
PROBES = {
    "write_speed": Probe(level="host", action="look at the storage, or save less often"),
    "import_megatron": Probe(level="gpu", action="compare `asvr env`"),
    "memory": Probe(level="gpu", action="end what else runs on the GPU (nvidia-smi)"),
    "norm": Probe(level="gpu", action=_TORCH),
    "remade_input": Probe(level="gpu", action=_TORCH),
    "attention": Probe(level="gpu", action=_TORCH),
    "bf16_product": Probe(level="gpu", action=_TORCH),
    "loss": Probe(level="gpu", action=_TORCH),
    "adam": Probe(level="gpu", action="look which FusedAdam megatron-core found; " + _TORCH),
    "seeded": Probe(level="gpu", action=_TORCH),
    "compiled": Probe(level="gpu", action="set TORCH_COMPILE_DISABLE=1 and report it"),
    "graphed": Probe(level="gpu", action="leave train.cuda_graphs off and report it"),
    "recomputed": Probe(level="gpu", action="train with train.recompute=none and report it"),
    "pinned_copy": Probe(
        level="gpu", action="raise the limit of locked memory, ulimit -l", short=True
    ),
    "saved_copy": Probe(level="gpu", action="save in the foreground and report it"),
    "decode": Probe(level="gpu", action="compare `asvr env`: DALI and the driver have to fit"),
    "token_flips": Probe(
        level="gpu", action="set data.pil_kinds or data.on_parity=pil", of_run=True
    ),
    "te_linear": Probe(level="gpu", action=_TE, short=True),
    "te_attention": Probe(level="gpu", action=_TE),
    "fused_gradient": Probe(level="gpu", action="compare `asvr env`: apex fits this torch"),
    "fp8_linear": Probe(level="gpu", action="train with precision.fp8.recipe=none; " + _TE),
    "gemm_rate": Probe(
        level="gpu", action="compare clocks and power limits in nvidia-smi -q", short=True
    ),
    "all_reduce": Probe(level="node", action="set NCCL_DEBUG=INFO; look at NVLink and /dev/shm"),
    "tensor_certificate": Probe(level="node", action=_LAYOUT + "tp=8 --shrink`", of_run=True),
    "pipeline_certificate": Probe(level="node", action=_LAYOUT + "pp=2 --shrink`", of_run=True),
    "all_reduce_nodes": Probe(level="nodes", action="`asvr preflight` names the pair of nodes"),
}
SHORT = tuple(name for name, probe in PROBES.items() if probe.short)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One line of the report.

    Attributes:
        row: of the ledger.
        probe: its name.
        level: what it needs.
        state: NOT RUN says nothing about the code.
        measured: the number, or why there is none.
        expected: what it is held against.
        action: what to do next; empty where nothing is to be done.
        seconds: it took.
    """

    row: str
    probe: str
    level: Level
    state: State
    measured: str
    expected: str = ""
    action: str = ""
    seconds: float = 0.0


def smoke(
    *, nodes: int = 1, config: str | None = None, timeout_s: float = TIMEOUT_S
) -> Iterator[Result]:
    """The results of all probes, as they come: of one GPU, then of a node, then of several.

    Args:
        nodes: that a launcher started ranks on; with several, only what needs several is run.
        config: run that some probes look at.
        timeout_s: how long a probe may take.
    """
    order = list(LEVELS)
    names = [name for row in ROWS for name in row.probes]
    for name in sorted(names, key=lambda name: order.index(PROBES[name].level)):
        yield run(name, nodes=nodes, config=config, timeout_s=timeout_s)


def run(
    name: str,
    *,
    nodes: int = 1,
    config: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Result:
    """The result of one probe, from a process of its own if it can run here.

    Args:
        name: of the probe.
        nodes: as in ``smoke``.
        config: as in ``smoke``.
        timeout_s: how long it may take.
    """
    probe = PROBES[name]
    found = missing(probe, nodes=nodes, config=config)
    start = time.perf_counter()
    if found is None:
        settings = [str(config)] if probe.of_run else []
        found = call(name, *settings, timeout_s=timeout_s)
    if found["state"] == "FAIL":
        found["action"] = probe.action
    (row,) = (row.name for row in ROWS if name in row.probes)
    seconds = round(time.perf_counter() - start, 1)
    return Result(row=row, probe=name, level=probe.level, seconds=seconds, **found)


def missing(probe: Probe, *, nodes: int, config: str | None) -> dict[str, str] | None:
    """Why a probe is not run here and what to do about it, or None.

    Args:
        probe: of ``PROBES``.
        nodes: that ranks run on.
        config: of the user's run.
    """
    platform, reason = select()
    if nodes > 1 and probe.level != "nodes":
        why = ("these are several nodes", "run it on one of them, too")
    elif nodes == 1 and probe.level == "nodes":
        why = ("this is one node", "run `srun --nodes=2 --ntasks-per-node=8 asvr gpu-smoke`")
    elif platform.num_gpus < LEVELS[probe.level]:
        seen = f"{platform.num_gpus} of {LEVELS[probe.level]} GPUs ({reason})"
        why = (seen, "run it on a machine with GPUs")
    elif probe.of_run and config is None:
        why = ("no run was named", "run `asvr gpu-smoke CONFIG`")
    else:
        return None
    return {"state": "NOT RUN", "measured": why[0], "action": why[1]}


def call(
    name: str, *settings: str, timeout_s: float, module: str = f"{__package__}.probe"
) -> dict[str, str]:
    """The state of a probe and what it measured, however its process ends.

    Args:
        name: of the probe.
        settings: its further arguments.
        timeout_s: how long it may take.
        module: that is run with the probe's name, a file to write to and ``settings``.
    """
    with tempfile.TemporaryDirectory(prefix="asvr-") as folder:
        file = Path(folder, "found")
        status, said = _ended([sys.executable, "-m", module, name, str(file), *settings], timeout_s)
        if status != 0:
            ended = "took too long" if status is None else f"ended with status {status}"
            return {"state": "FAIL", "measured": f"{ended}: {said}".strip(": ")}
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return {"state": "FAIL", "measured": f"wrote no answer ({error}); {said}"}
    if "unfit" in told:
        way = "none, if the run does without it"
        return {"state": "NOT RUN", "measured": told["unfit"], "action": way}
    state = "PASS" if told.pop("ok") else "FAIL"
    return {"state": state, **told}


def _ended(command: Sequence[str], timeout_s: float) -> tuple[int | None, str]:
    """A command's exit status and last words; None: it took too long, and was ended with all."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        status: int | None = None
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return status, output.read().decode("utf-8", "replace").strip()[-_KEPT:]
