"""Tests: unit (one process), world (several gloo ranks), gpu, golden (expected numbers)."""
