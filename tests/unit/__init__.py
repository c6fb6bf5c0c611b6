"""Tests of one process, each well under a second."""
