"""The code cache and the fit of a tokenizer: what they cost as the number of images grows.

    python -m benchmarks.codes [--short]

Prints the bytes of an image in the cache at 729 patches x 8 depths; how long opening a cache takes
and reading one image's codes; and the peak memory of fitting a tokenizer to the same number of
vectors out of more and more images (each in a process of its own; features are random numbers).
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from megatron_asvr.data.cache import CodeCache
from megatron_asvr.model.kmeans import fit_codebooks
from megatron_asvr.train.fit_sample import FitSample

PART = 4096  # images of a file
WIDTH, PATCHES, BATCH = 256, 729, 64
MAX_VECTORS, SIZES = 20_000, (256, 256)


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description="Cost of the code cache and of a fit.")
    parser.add_argument("--short", action="store_true", help="fewer images")
    parser.add_argument("--fit", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fit:
        print(fit(args.fit))
        return
    print(f"bytes of an image at 729 x 8: {image_bytes():.0f}")
    for images in (1_000, 10_000) if args.short else (10_000, 100_000, 1_000_000):
        open_ms, get_us = times(images)
        print(f"{images:,} images: opened in {open_ms:.1f} ms, an image in {get_us:.0f} us")
    for images in (256, 1024) if args.short else (640, 2560, 10_240):
        command = [sys.executable, "-m", "benchmarks.codes", "--fit", str(images)]
        peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        features = images * PATCHES * WIDTH * 4 / 2**20
        print(f"fit on {images:,} images ({features:,.0f} MiB of features): peak {peak.strip()}")


def image_bytes() -> float:
    """Bytes on disk of one image of many."""
    with tempfile.TemporaryDirectory() as folder:
        cache = CodeCache(folder, {}, num_patches=729, codebook_sizes=[16384] * 8)
        cache.write([f"{n:064x}" for n in range(PART)], np.zeros((PART, 729, 8), np.int64))
        cache.write_index()
        return sum(file.stat().st_size for file in cache.folder.iterdir()) / PART


def times(images: int) -> tuple[float, float]:
    """Milliseconds to open a cache (the best of five) and microseconds to read an image."""
    form = {"num_patches": 4, "codebook_sizes": [256] * 2}
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        cache = CodeCache(folder, {}, **form)
        keys: list[str] = []
        for start in range(0, images, PART):
            number = min(PART, images - start)
            raw = generator.bytes(32 * number)
            keys = [raw[32 * n : 32 * n + 32].hex() for n in range(number)]
            cache.write(keys, np.zeros((number, 4, 2), np.int64))
        cache.write_index()
        opening = []
        for _ in range(5):
            start_s = time.perf_counter()
            opened = CodeCache(folder, {}, **form)
            opening.append(time.perf_counter() - start_s)
        start_s = time.perf_counter()
        for key in keys:
            opened.get(key)
        return min(opening) * 1e3, (time.perf_counter() - start_s) / len(keys) * 1e6


def fit(images: int) -> str:
    """Peak memory of fitting to some vectors of so many images."""
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        sample = FitSample(
            Path(folder),
            [f"{n:064x}" for n in range(images)],
            num_patches=PATCHES,
            max_vectors=MAX_VECTORS,
            codebook_sizes=SIZES,
            batch=BATCH,
            iters=2,
            seed=0,
            facts={},
            group=None,
        )
        sample.read(lambda keys: torch.randn(len(keys), PATCHES, WIDTH, generator=generator))
        blocks = sample.vectors(torch.device("cpu"), WIDTH)
        fit_codebooks(blocks, SIZES, seed=0, iters=2, journal=sample)
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:,.0f} MiB"


if __name__ == "__main__":
    main()
