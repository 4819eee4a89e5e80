"""Fitting reads states from the disk: what a process holds does not grow with them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import fit_memory  # noqa: E402


def test_ten_times_the_traces_take_the_memory_of_an_index():
    few, many = (fit_memory.measured(count) for count in (2_000, 20_000))
    state = 4 * fit_memory.LAYERS * fit_memory.SIZE  # bytes
    for name in ("loaded_mb", "loading_peak_mb", "fitting_peak_mb"):
        more = (many[name] - few[name]) * 2**20 / (many["traces"] - few["traces"])
        assert more < state / 2, name  # digests, labels, where a trace lies, an order: however wide the states
