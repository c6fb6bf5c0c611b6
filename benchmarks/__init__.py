"""Measurements: each file is a program, run by `make bench` and, reduced, by CI."""
