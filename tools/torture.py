"""Kill, starve and corrupt runs until the given number of faults has happened; print the counts."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.torture import LostError, Torture


def main() -> int:
    """Exit status: 1 when a run was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="saves in which a rank is killed")
    parser.add_argument("--full", type=int, default=20, help="saves without room on the disk")
    parser.add_argument("--flips", type=int, default=20, help="bits flipped in checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-mount", action="store_true", help="limit files instead of the disk")
    args = parser.parse_args()
    started, lost = time.monotonic(), ""
    with tempfile.TemporaryDirectory(prefix="asvr-torture-") as root:
        torture = Torture(Path(root), args.seed, mount=not args.no_mount)
        faults = torture.faults(kills=args.kills, full=args.full, flips=args.flips)
        try:
            torture.run(faults)
        except LostError as err:
            lost = str(err)
    for name, count in torture.counts.items():
        print(f"{name}: {count}")
    print(f"lost runs: {int(bool(lost))}, in {time.monotonic() - started:.0f} s {lost}".rstrip())
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
