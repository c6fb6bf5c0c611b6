"""Recorded numbers that tests compare with."""
