"""Save a run, continue it bit by bit, and read its weights without building a model."""
