"""Tensors on their way from disk to disk: a few megabytes at a time, on a few threads.

Reading, hashing, checking and writing all happen outside Python's lock, so threads overlap them.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from torch import Tensor

from megatron_asvr.parallel.stored import Stored

MAX_THREADS = 4  # more of them wait for the disk and for memory


def run_all(tasks: Iterable[Callable[[], object]]) -> None:
    """Return when all tasks are done, begun in their order on a few threads.

    Raises:
        Exception: the first of a task; those that have not begun are dropped.
    """
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    # Each thread is one of torch's threads, not the master of a team of its own.
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def flat_chunks(*tensors: Stored) -> Iterator[tuple[int, list[Tensor]]]:
    """First element and contents of consecutive parts of tensors of one shape.

    Every part is gone when the next is asked for.
    """
    chunks = list(max(tensors, key=lambda x: x.dtype.itemsize).chunks())
    room = max((end - start for start, end in chunks), default=0)
    buffers = [torch.empty(room, dtype=x.dtype) for x in tensors]
    for start, end in chunks:
        parts = [buffer[: end - start] for buffer in buffers]
        for part, tensor in zip(parts, tensors, strict=True):
            tensor.fill(part, start)
        yield start, parts
