"""Measurements: each file is a program, run by `make bench` or `make bench-convert`, and by CI."""
