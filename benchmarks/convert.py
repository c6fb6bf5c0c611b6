"""How fast and in how much memory conversion runs, beside a plain copy of the same files.

    make bench-convert                       8 GB
    python -m benchmarks.convert --gb N --dir FOLDER

A LLaVA model of random bf16 numbers is made, then imported; the imported weights are saved as a
run saves them (frozen encoder, distributed checkpoint of what is trained), and that run is exported
and verified. Every row of the table is a process of its own. Before each one the page cache forgets
its input, and each ends when its output is on the disk (fsync).

``seconds`` leaves out the start of Python and the imports, which are in ``whole``; ``CPU`` is that
of all threads in these seconds. ``peak`` is the largest resident memory of the process (VmHWM): its
own and that of files it maps, but not the page cache of files that it reads. The files, up to
three times N GB, are removed at the end.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LIMIT_BYTES = 2_500_000_000
CHUNK_BYTES = 8 << 20


def copy(source: Path, target: Path) -> None:
    """Copy a folder's files as `cp` does, onto the disk."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        out = target / path.relative_to(source)
        out.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as reader, out.open("wb") as writer:
            while os.sendfile(writer.fileno(), reader.fileno(), None, CHUNK_BYTES):
                pass
            os.fsync(writer.fileno())


def steps(folder: Path) -> dict[str, Callable[[], object]]:
    """What is measured, by name."""

    def import_() -> object:
        from megatron_asvr.hf.run import import_weights

        return import_weights(str(folder / "hf"), str(folder / "imported"))

    def export() -> object:
        from megatron_asvr.hf.run import export_run

        return export_run(str(folder / "run"), str(folder / "out"), dtype="bf16")

    def verify() -> object:
        from megatron_asvr.hf.run import verify_weights

        report = verify_weights(str(folder / "run"), str(folder / "out"))
        if not report["ok"]:
            raise SystemExit(str(report))
        return report

    return {
        "copy": lambda: copy(folder / "hf", folder / "copy"),
        "import": import_,
        "copy of the run": lambda: copy(folder / "run", folder / "copy"),
        "export, verified": export,
        "verify": verify,
    }


def measured(name: str, folder: Path) -> dict[str, float]:
    """Seconds and peak memory of one step, in this process."""
    step = steps(folder)[name]
    if not name.startswith("copy"):
        from benchmarks import convert_model

        convert_model.prepare()
    before = memory("VmRSS")
    started, cpu = time.perf_counter(), time.process_time()
    step()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = memory("VmHWM")
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "grown": peak - before}


def memory(what: str) -> int:
    """Bytes of this process, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def forget(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def size_of(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def make(what: str, folder: Path, gb: float) -> None:
    """Make the model or the run, and say so."""
    from benchmarks import convert_model

    if what == "make the model":
        convert_model.make_model(folder / "hf", gb)
    else:
        convert_model.make_run(folder / "imported", folder / "run")
    print("{}")


def child(step: str, folder: Path, gb: float) -> dict[str, float]:
    """What a step prints as JSON, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.convert", "--step", step]
    command += ["--dir", str(folder), "--gb", str(gb)]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"whole": time.perf_counter() - started}


def row(name: str, folder: Path, gb: float, source: Path, base: float | None) -> dict[str, float]:
    """Measure one step and print its row."""
    forget(folder)
    size, load = size_of(source) / 1e9, os.getloadavg()[0]
    found = child(name, folder, gb)
    rate = size / found["seconds"]
    share = f"{rate / base:.2f}" if base else "1"
    print(
        f"| {name} | {size:.2f} | {found['seconds']:.1f} | {found['cpu']:.1f} "
        f"| {found['whole']:.1f} | {rate:.2f} | {share} | {found['peak'] / 1e9:.2f} | {load:.1f} |",
        flush=True,
    )
    return found | {"rate": rate}


def bench(folder: Path, gb: float) -> None:
    """Measure everything and print the table."""
    print("| step | GB | seconds | CPU | whole | GB/s | of the copy | peak, GB | load before |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    child("make the model", folder, gb)
    base = row("copy", folder, gb, folder / "hf", None)["rate"]
    shutil.rmtree(folder / "copy")
    found = [row("import", folder, gb, folder / "hf", base)]
    shutil.rmtree(folder / "hf")
    child("make the run", folder, gb)
    shutil.rmtree(folder / "imported")
    base = row("copy of the run", folder, gb, folder / "run", None)["rate"]
    shutil.rmtree(folder / "copy")
    found += [row(x, folder, gb, folder / "run", base) for x in ("export, verified", "verify")]
    peak, grown = (max(each[key] for each in found) for key in ("peak", "grown"))
    print(f"largest peak {peak / 1e9:.2f} GB, of which the conversion itself {grown / 1e9:.2f} GB")
    if peak >= LIMIT_BYTES or grown >= gb * 1e9 / 2:
        raise SystemExit("too much: the limits are 2.5 GB, and half the model for what is its own")


def main() -> None:
    """Run everything, or one step for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=8.0, help="size of the model")
    parser.add_argument("--dir", type=Path, help="where to work; default: the system's /tmp")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step in ("make the model", "make the run"):
        make(args.step, args.dir, args.gb)
    elif args.step:
        print(json.dumps(measured(args.step, args.dir)))
    else:
        with tempfile.TemporaryDirectory(prefix="bench-convert-", dir=args.dir) as folder:
            bench(Path(folder), args.gb)


if __name__ == "__main__":
    main()
