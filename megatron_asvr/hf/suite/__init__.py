"""A suite of benchmarks for an exported model: prompts, rules and scores are lmms-eval's.

``tasks`` says which benchmarks; ``lmms`` is the one door to lmms-eval, opens their local data and
scores answers; ``answer`` asks the model through its own processor; ``report`` makes one table.
"""
