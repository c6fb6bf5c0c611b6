"""A probe in a process of its own: ``python -m megatron_asvr.launch.probe NAME FILE [CONFIG]``."""

import dataclasses
import json
import sys
from pathlib import Path

from megatron_asvr.platforms import select

from megatron_asvr.config.load import load
from megatron_asvr.launch import probes, probes_of_runs
from megatron_asvr.launch.rank import place

FUNCTIONS = {**vars(probes), **vars(probes_of_runs)}


def main(name: str, file: str, config: str | None = None) -> None:
    """Run a probe and write what it found; an error ends the process.

    Args:
        name: of a function.
        file: to be written, JSON: a ``Found``, or why the machine is unfit.
        config: of the run that some probes look at.
    """
    here = place()
    select()[0].set_device(0 if here is None else here.local_rank)
    try:
        told = dataclasses.asdict(FUNCTIONS[name](*([] if config is None else [load(config)])))
    except probes.UnfitError as why:
        told = {"unfit": str(why)}
    Path(file).write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
