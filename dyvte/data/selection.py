"""Which samples of a source are used, in which order and under which names."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Item = TypeVar("Item")


def shuffled(rows: Iterable[int], config: Mapping[str, Any]) -> list[int]:
    """The rows in the order of the config's seed; without one, as they are."""
    rows = list(rows)
    if config.get("seed") is not None:
        random.Random(config["seed"]).shuffle(rows)
    return rows


def selected(samples: list[Item], config: Mapping[str, Any]) -> list[Item]:
    """What ``skip``, and ``limit`` or ``fraction``, leave of the samples. A fraction is one of all that were given.

    Raises:
        ValueError: none is left.
    """
    start, number = config.get("skip") or 0, config.get("limit")
    if config.get("fraction") is not None:
        number = max(1, round(config["fraction"] * len(samples)))
    chosen = samples[start : None if number is None else start + number]
    if not chosen:
        raise ValueError(
            f"{config['path']} has no rows left in split {config.get('split')!r}: {len(samples)} can be used, and "
            f"skip is {start}"
        )
    return chosen


def unique(names: Iterable[str]) -> list[str]:
    """The names, numbered where they repeat: ``a, a#2, a#3``."""
    names = list(names)
    taken, times = set(names), Counter()
    for i, name in enumerate(names):
        times[name] += 1
        while times[name] > 1 and names[i] in taken:
            names[i] = f"{name}#{times[name]}"
            times[name] += names[i] in taken  # somebody's own name
        taken.add(names[i])
    return names
