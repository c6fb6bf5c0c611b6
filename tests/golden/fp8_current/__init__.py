"""Recorded output of a reference quantizer."""
