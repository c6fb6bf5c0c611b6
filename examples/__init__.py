"""Recipes around the package; nothing in the package imports them."""
