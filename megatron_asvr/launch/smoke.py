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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_asvr.platforms import select
from megatron_asvr.platforms.ledger import ROWS

Level = Literal["host", "gpu", "node", "nodes"]
State = Literal["PASS", "FAIL", "NOT RUN"]
LEVELS: dict[Level, int] = {"host": 0, "gpu": 1, "node": 2, "nodes": 1}  # GPUs of a node needed
TIMEOUT_S = 180.0
_KEPT = 2000  # characters of a failed probe's last words in the bundle


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """How a probe of the ledger is run.

    Attributes:
        level: what it needs.
        action: what to do next when it fails.
        settings: of a layout certificate of the user's run; None: a function of ``probes.py``.
    """

    level: Level
    action: str
    settings: tuple[str, ...] | None = None


_TE = "compare `asvr env`; precision.backend=local goes without Transformer Engine"
_TORCH = "compare `asvr env`: torch's build, CUDA and the driver have to fit"
PROBES = {
    "write_speed": Probe(level="host", action="look at the storage, or save less often"),
    "import_megatron": Probe(level="gpu", action="compare `asvr env`"),
    "memory": Probe(level="gpu", action="end what else runs on the GPU (nvidia-smi)"),
    "norm": Probe(level="gpu", action=_TORCH),
    "attention": Probe(level="gpu", action=_TORCH),
    "bf16_product": Probe(level="gpu", action=_TORCH),
    "loss": Probe(level="gpu", action=_TORCH),
    "adam": Probe(level="gpu", action="look which FusedAdam megatron-core found; " + _TORCH),
    "seeded": Probe(level="gpu", action=_TORCH),
    "compiled": Probe(level="gpu", action="set TORCH_COMPILE_DISABLE=1 and report it"),
    "recomputed": Probe(level="gpu", action="train with train.recompute=none and report it"),
    "pinned_copy": Probe(level="gpu", action="raise the limit of locked memory (ulimit -l)"),
    "saved_copy": Probe(level="gpu", action="save in the foreground and report it"),
    "decode": Probe(level="gpu", action="compare `asvr env`: DALI and the driver have to fit"),
    "te_linear": Probe(level="gpu", action=_TE),
    "te_attention": Probe(level="gpu", action=_TE),
    "fused_gradient": Probe(level="gpu", action="compare `asvr env`: apex fits this torch"),
    "fp8_linear": Probe(level="gpu", action="train with precision.fp8.recipe=none; " + _TE),
    "gemm_rate": Probe(level="gpu", action="look at clocks and power limits (nvidia-smi -q)"),
    "all_reduce": Probe(level="node", action="set NCCL_DEBUG=INFO; look at NVLink and /dev/shm"),
    "tensor_certificate": Probe(
        level="node",
        action="`asvr certify` with these settings names the first tensor that differs",
        settings=("parallel.tp=2",),
    ),
    "pipeline_certificate": Probe(
        level="node",
        action="`asvr certify` with these settings names the first tensor that differs",
        settings=("parallel.pp=2",),
    ),
    "all_reduce_nodes": Probe(level="nodes", action="`asvr preflight` names the pair of nodes"),
}


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
    """The results, as they come.

    Args:
        nodes: that a launcher started ranks on; with several, only what needs several is run.
        config: run whose layouts are certified.
        timeout_s: how long a probe may take.
    """
    named = [(row.name, probe) for row in ROWS for probe in row.probes]
    order = list(LEVELS)
    for row, name in sorted(named, key=lambda pair: order.index(PROBES[pair[1]].level)):
        probe = PROBES[name]
        why = missing(probe, nodes=nodes, config=config)
        if why is not None:
            yield Result(row=row, probe=name, level=probe.level, state="NOT RUN", **why)
        elif probe.settings is not None:
            yield _certificate(row, name, str(config), timeout_s)
        else:
            yield run(row, name, timeout_s)


def missing(probe: Probe, *, nodes: int, config: str | None) -> dict[str, str] | None:
    """Why a probe is not run here and what to do about it, or None.

    Args:
        probe: of ``PROBES``.
        nodes: that ranks run on.
        config: of the user's run.
    """
    platform, reason = select()
    if (nodes > 1) != (probe.level == "nodes"):
        if nodes > 1:
            return {"measured": "these are several nodes", "action": "run it on one of them, too"}
        way = "run `srun --nodes=2 --ntasks-per-node=8 asvr gpu-smoke`"
        return {"measured": "this is one node", "action": way}
    if platform.num_gpus < LEVELS[probe.level]:
        seen = f"{platform.num_gpus} GPUs of {LEVELS[probe.level]} ({reason})"
        return {"measured": seen, "action": "run it on a machine with GPUs"}
    if probe.settings is not None and config is None:
        return {"measured": "no run was named", "action": "run `asvr gpu-smoke CONFIG`"}
    return None


def run(row: str, name: str, timeout_s: float, module: str = f"{__package__}.probes") -> Result:
    """The result of a probe, from a process of its own.

    Args:
        row: of the ledger.
        name: of the probe.
        timeout_s: how long it may take.
        module: that is run with the probe's name and a file to write to.
    """
    with tempfile.TemporaryDirectory(prefix="asvr-") as folder:
        file = Path(folder, "found")
        done = _call([sys.executable, "-m", module, name, str(file)], timeout_s)

        def found() -> dict[str, str]:
            try:
                told = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                return {"state": "FAIL", "measured": f"wrote no answer ({error}); {done.said}"}
            if "unfit" in told:
                return {"state": "NOT RUN", "measured": told["unfit"]}
            state = "PASS" if told["ok"] else "FAIL"
            return {"state": state, "measured": told["measured"], "expected": told["expected"]}

        return _result(row, name, done, found)


def _certificate(row: str, name: str, config: str, timeout_s: float) -> Result:
    command = [sys.executable, "-m", "megatron_asvr", "certify", config]
    done = _call([*command, *(PROBES[name].settings or ())], timeout_s)
    return _result(
        row,
        name,
        done,
        lambda: {"state": "PASS", "measured": "equal", "expected": "that of one rank"},
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Done:
    status: int | None  # None: it took too long
    said: str
    seconds: float


def _call(command: Sequence[str], timeout_s: float) -> _Done:
    """Run a command; when it takes too long, end it and all that it started."""
    start = time.perf_counter()
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
        said = output.read().decode("utf-8", "replace").strip()
    return _Done(status=status, said=said[-_KEPT:], seconds=time.perf_counter() - start)


def _result(row: str, name: str, done: _Done, found: Callable[[], dict[str, str]]) -> Result:
    if done.status == 0:
        told = found()
    else:
        ended = "took too long" if done.status is None else f"ended with status {done.status}"
        told = {"state": "FAIL", "measured": f"{ended}: {done.said}".strip(": ")}
    action = "" if told["state"] == "PASS" else PROBES[name].action
    level = PROBES[name].level
    return Result(row=row, probe=name, level=level, action=action, seconds=done.seconds, **told)
