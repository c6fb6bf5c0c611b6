"""Tests that start several gloo ranks; marked ``world``."""
