"""A job in which one rank skips a collective: it is told who, and the job starts again."""

import os
import re
from pathlib import Path

import pytest

from tests.hangs import HANG_S, STEP
from tests.slurm.jobs import finished, logs, same_weights, submit, task, write_config

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
# Python imports a module of this name when it starts: so rank 1 of the first start is changed.
PLANT = """
import os

if os.environ.get("SLURM_PROCID") == "1" and not os.environ.get("SLURM_RESTART_COUNT"):
    from tests.hangs import skip_a_collective

    skip_a_collective()
"""


def test_a_hang_is_found_and_the_job_starts_again(
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
    assert "requeued: crashes 1 of" in said
    assert "in agree" in (run / "attempts" / "0" / "rank_0.log").read_text()
    assert task(run)["crashes"] == 1
    same_weights(run, undisturbed)
