"""A job in which one rank skips a collective, then its GPU: the causes are told, and it goes on."""

import json
import os
import re
from pathlib import Path

import pytest

from tests.hangs import HANG_S, STEP
from tests.slurm.jobs import finished, logs, same_weights, submit, task, write_config

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
# Python imports a module of this name when it starts: so rank 1 of the first two is changed.
PLANT = """
import os

start = os.environ.get("SLURM_RESTART_COUNT")
if os.environ.get("SLURM_PROCID") == "1" and start != "2":
    from tests import hangs

    hangs.break_memory() if start else hangs.skip_a_collective()
"""


def test_a_hang_and_a_broken_node_are_named_and_the_job_goes_on(
    cluster, files, undisturbed, tmp_path, monkeypatch
):
    (tmp_path / "sitecustomize.py").write_text(PLANT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    run = tmp_path / "hanging"
    submit(write_config(files, run, train__watchdog__hang_s=HANG_S))
    finished(run)
    said = logs(run)
    assert f"no progress in step {STEP};" in said
    assert re.search(r"culprit: rank 1 on asvrnode\d .*/step.py:\d+ in agree", said)
    assert "in agree" in (run / "attempts" / "0" / "rank_0.log").read_text()
    assert "requeued: crashes 1 of" in said
    faults = [json.loads(line) for line in (run / "slurm" / "faults.jsonl").open()]
    assert [(fault["why"], fault["sure"]) for fault in faults] == [
        (f"hang in step {STEP}", False),
        ("uncorrectable ECC error", True),
    ]
    bad = faults[1]["host"]
    assert (run / "slurm" / "exclude").read_text() == f"{bad}\n"
    assert f"not to be taken again: {bad}" in said
    last_start = said.rpartition(": job ")[2]
    assert bad not in last_start
    assert task(run)["restarts"] == 2
    same_weights(run, undisturbed)
