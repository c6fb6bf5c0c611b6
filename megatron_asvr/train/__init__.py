"""Training and asking: the step, the loop, evaluation, generation."""
