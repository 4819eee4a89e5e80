"""Which visual tokens to keep: one file per idea."""

from dyvte.methods.exits import ExitPolicy, FixedExit, LearnedExit, NeverExit, RandomExit
from dyvte.methods.fastv import FastV
from dyvte.methods.random_pruning import RandomPruning

__all__ = ["ExitPolicy", "FastV", "FixedExit", "LearnedExit", "NeverExit", "RandomExit", "RandomPruning"]
