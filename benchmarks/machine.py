"""What the machine can do: rates of one thread, and the memory of this process."""

import time
from pathlib import Path

import torch


def matmul_gflops(size: int = 1536, repeats: int = 4) -> float:
    """GFLOP per CPU-second of a square fp32 product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = a @ b
    start_s = time.process_time()
    for _ in range(repeats):
        torch.mm(a, b, out=out)
    return 2e-9 * repeats * size**3 / (time.process_time() - start_s)


def copy_gb_per_s(mib: int = 256, repeats: int = 4) -> float:
    """GB that are read and written per CPU-second of copying one tensor over another."""
    source = torch.ones(mib, 2**18)
    target = source.clone()
    start_s = time.process_time()
    for _ in range(repeats):
        target.copy_(source)
    return 2e-9 * repeats * source.numel() * 4 / (time.process_time() - start_s)


def memory_mib(field: str) -> float:
    """A line of this process's status in MiB: ``VmRSS`` now, ``VmHWM`` at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 2**10
    raise ValueError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Let ``VmHWM`` begin again at the present memory."""
    Path("/proc/self/clear_refs").write_text("5")
