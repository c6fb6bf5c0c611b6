"""Everything that knows NVIDIA DALI."""
