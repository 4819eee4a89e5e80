"""Memory that fitting heads takes, by the number of traces: synthetic ones of a small width, mapped from the disk.

Each number of traces is loaded and fitted by a process of its own. What grows with them is the memory that a process
owns (RssAnon); pages of mapped files come and go as the system pleases, and are told apart.

    python benchmarks/fit_memory.py             # 2,000, 20,000 and 200,000 traces, about 300 MB on the disk
    python benchmarks/fit_memory.py 1000 5000   # others
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dyvte.provenance import write_json
from dyvte.training.fit import FitSettings, fit_heads
from dyvte.training.identity import FORMAT, PROVENANCE
from dyvte.training.plan import MAX_UNIT, PLAN, Plan
from dyvte.training.store import load_traces
from dyvte.training.units import Manifest, write_unit

LAYERS, SIZE = 8, 48
SETTINGS = FitSettings(width=16, epochs=1, batch_size=256)


def write(folder: Path, count: int) -> None:
    """Traces whose states tell the first good exit."""
    record = {"format": FORMAT, "base_model": "made/up", "num_layers": LAYERS, "hidden_size": SIZE, "min_layer": 1}
    record |= {"weights": "none", "dtype": "float16", "attention": "none", "processor": "none", "answers": "dense"}
    plan = Plan.of(count, MAX_UNIT, MAX_UNIT)
    write_json(folder / PROVENANCE, record | {"exits": None, "samples": count, "data": {"made": "up"}})
    write_json(folder / PLAN, plan.as_dict())
    random = np.random.default_rng(0)
    for number, unit in enumerate(plan.units):
        first = random.integers(1, LAYERS + 1, len(unit))
        agreement = (np.arange(1, LAYERS + 1) >= first[:, None]).astype(np.float32)
        state = random.standard_normal((len(unit), LAYERS, 2 * SIZE), dtype=np.float32)
        state[..., 0] += 3 * agreement
        rows = [
            {
                "id": f"sample-{i}",
                "kind": "made up",
                "question": "what is it",
                "answers": ["nothing"],
                "traced_answer": "nothing",
                "text_tokens": 3,
                "visual_tokens": 4,
                "state": state[row].astype(np.float16).ravel(),
                "visual": state[row, 0, :SIZE].astype(np.float16),
                "agreement": agreement[row],
                "nll": (1 - agreement[row]).astype(np.float16),
                "kl": (1 - agreement[row]).astype(np.float16),
                "dense_nll": 0.0,
            }
            for row, i in enumerate(unit)
        ]
        digests = [f"{i:064x}" for i in unit]
        ids, answers = [row["id"] for row in rows], [row["answers"] for row in rows]
        write_unit(folder, number, rows, Manifest(unit, ids, digests, [[digest] for digest in digests], answers))


class Watch:
    """The largest values of this process's memory, in MB, as the kernel tells them."""

    def __init__(self) -> None:
        self.peak: dict[str, float] = {}
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self.look()
            time.sleep(0.005)

    def look(self) -> dict[str, float]:
        found = dict(re.findall(r"^(RssAnon|RssFile):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M))
        now = {name: int(value) / 1024 for name, value in found.items()}
        self.peak = {name: max(value, self.peak.get(name, 0)) for name, value in now.items()}
        return now


def measure(folder: Path) -> dict[str, Any]:
    """Loads and fits in this process."""
    torch.set_num_threads(1)
    watch = Watch()
    warm()
    before = watch.look()
    watch.peak = {}
    traces = load_traces(folder)
    loaded, peak = watch.look(), dict(watch.peak)
    watch.peak = {}
    began = time.perf_counter()
    fit_heads(traces, SETTINGS, progress=False)
    watch.look()
    return {
        "before_mb": before["RssAnon"],
        "loaded_mb": loaded["RssAnon"],
        "loading_peak_mb": peak["RssAnon"],
        "fitting_peak_mb": watch.peak["RssAnon"],
        "mapped_peak_mb": watch.peak["RssFile"],
        "fit_seconds": time.perf_counter() - began,
    }


def warm() -> None:
    """Takes what libraries take when they are first used."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), 2 * SETTINGS.batch_size)
        fit_heads(load_traces(folder), SETTINGS, progress=False)


def measured(count: int) -> dict[str, Any]:
    """In a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), count)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.arrow"))
        command = [sys.executable, __file__, "--measure", folder]
        places = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=places).stdout)
    return {"traces": count, "disk_mb": size / 2**20} | found


def main() -> None:
    from shapes import record

    rows = [measured(count) for count in map(int, sys.argv[1:] or (2_000, 20_000, 200_000))]
    few, many = rows[0], rows[-1]
    more = many["traces"] - few["traces"]
    result = {
        "command": "python benchmarks/fit_memory.py",
        "layers": LAYERS,
        "hidden_size": SIZE,
        "state_bytes_per_trace": 4 * LAYERS * SIZE,
        "held_bytes_per_trace": (many["loaded_mb"] - few["loaded_mb"]) * 2**20 / more,
        "peak_bytes_per_trace": (many["fitting_peak_mb"] - few["fitting_peak_mb"]) * 2**20 / more,
        "runs": rows,
    }
    record("fit_memory", result)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
    else:
        main()
