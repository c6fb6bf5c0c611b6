"""What a device can do in a second: products of dense matrices, and NVLink.

By a GPU's data sheet, or measured where there is none. A run's log takes its share of the products
(MFU; 8-bit runs are held against bf16's rate), a smoke holds what it measures against data sheets.

Source: NVIDIA's data sheets (A100 80GB, H100, H200, L40S, HGX B200), without sparsity; fp32 without
TF32, which torch does not use by itself.
"""

import time

from megatron_asvr.platforms.base import Platform

import torch

# By a part of the product name, the more particular first: operations per second in bf16 and fp32.
_PEAKS = {
    "A100": (312e12, 19.5e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "GH200": (989e12, 67e12),
    "L40S": (362e12, 91.6e12),
    "B200": (2250e12, 75e12),
}


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """Operations per second, or None for a GPU that is not in the table.

    Args:
        name: product name, as ``torch.cuda.get_device_name`` gives it.
        dtype: float32 or bfloat16.
    """
    for part, (bf16, fp32) in _PEAKS.items():
        if part in name:
            return bf16 if dtype == torch.bfloat16 else fp32
    return None


def measured_flops(platform: Platform, dtype: torch.dtype, *, size: int = 1024) -> float:
    """Operations per second of the best of a few square products, in this process now.

    Args:
        platform: of the device.
        dtype: of the matrices.
        size: of their sides; 1024 takes some 10 ms of a CPU core for each product.
    """
    x = torch.ones(size, size, dtype=dtype, device=platform.device)
    best_s = float("inf")
    for _ in range(4):
        platform.synchronize()
        start = time.perf_counter()
        x @ x
        platform.synchronize()
        best_s = min(best_s, time.perf_counter() - start)
    return 2.0 * size**3 / best_s


# GB/s that a GPU sends over NVLink where all of a node's are connected: half of the data sheets'
# sum of both directions.
_LINKS = {"A100-SXM": 300.0, "H100 80GB HBM3": 450.0, "H200": 450.0, "B200": 900.0}


def link_gb_s(name: str) -> float | None:
    """GB/s to the other GPUs of a node, or None for a GPU that is not known to have NVLink to all.

    Args:
        name: product name, as ``torch.cuda.get_device_name`` gives it.
    """
    return next((speed for part, speed in _LINKS.items() if part in name), None)
