"""`asvr`, whose ranks wait before a step until a test lets them go on: faults strike at a place.

``ASVR_TEST_GATES`` is a JSON object: ``folder`` for messages, and ``steps``, the step before which
the ranks of a start wait, by the number of the start.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_asvr.cli.main import main as asvr
from megatron_asvr.train import loop

VARIABLE = "ASVR_TEST_GATES"
LIMIT_S = 900.0


def main() -> int:
    module, arguments = sys.argv[1:3], sys.argv[3:]
    assert module == ["-m", "megatron_asvr"]
    gates = json.loads(os.environ[VARIABLE])
    start = os.environ.get("SLURM_RESTART_COUNT", "0")
    train_step, place = loop.train_step, gates["steps"].get(start)

    def gated(*args: Any, step: int, **kwargs: Any) -> Any:
        if step == place:
            wait(Path(gates["folder"]), start)
        return train_step(*args, step=step, **kwargs)

    loop.train_step = gated
    return asvr(arguments)


def wait(folder: Path, start: str) -> None:
    rank, deadline = os.environ["SLURM_PROCID"], time.monotonic() + LIMIT_S
    part = folder / f"part.{start}.{rank}"
    part.write_text(str(os.getpid()))
    part.rename(folder / f"{start}.rank_{rank}")
    while not (folder / f"{start}.open").exists():
        assert time.monotonic() < deadline, "nobody opens the gate"
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
