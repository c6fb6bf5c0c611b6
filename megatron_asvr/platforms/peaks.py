"""Products of dense matrices that a GPU can do in a second, by its data sheet.

They are what a run's log takes its share of (MFU). 8-bit runs are held against bf16's rate.

Source: NVIDIA's data sheets (A100 80GB, H100, H200, L40S, HGX B200), without sparsity; fp32 without
TF32, which torch does not use by itself.
"""

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
