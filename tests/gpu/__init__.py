"""Tests that need a CUDA device; marked ``gpu``."""
