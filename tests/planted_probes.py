"""Probes that end in every way: ``python -m tests.planted_probes NAME FILE``."""

import json
import sys
import time
from pathlib import Path


def main(name: str, file: str) -> None:
    found = {"measured": "2", "expected": "2"}
    match name:
        case "norm":
            Path(file).write_text(json.dumps({"ok": True, **found}))
        case "attention":
            Path(file).write_text(json.dumps({"ok": False, **found}))
        case "te_linear":
            Path(file).write_text(json.dumps({"unfit": "no Transformer Engine"}))
        case "loss":
            sys.exit("Xid 79: the GPU has fallen off the bus")
        case "adam":
            while True:
                time.sleep(60)
        case "seeded":
            Path(file).write_text("half")


if __name__ == "__main__":
    main(*sys.argv[1:])
