"""What happens off the calibrated distribution, with and without the guard.

Two tests. Whole question kinds are held out of training and calibration, one after the other, and asked then. And the
shipped heads meet images of another style: inverted ones, and grainy ones.

    python benchmarks/guard.py    # after `make traces heads`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from shapes import record

from dyvte.heads import ExitHeads
from dyvte.training.calibrate import calibrate, disagreement, exits_at
from dyvte.training.fit import FitSettings, fit_heads, logits_of, probability_of
from dyvte.training.store import TraceSet, load_traces

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs/traces"
ALPHA = 0.01


def behaviour(heads: ExitHeads, traces: TraceSet, guarded: bool) -> dict[str, float]:
    """Changed answers and mean exit layer at the heads' threshold."""
    scores = probability_of(heads, traces) if guarded else logits_of(heads, traces.state).sigmoid()
    exits = exits_at(scores.double(), heads.config.threshold)
    changed = disagreement(traces.agreement >= 1, exits).double()
    return {"changed": changed.mean().item(), "mean_exit_layer": exits.double().mean().item(), "samples": len(traces)}


def both(heads: ExitHeads, free: ExitHeads, traces: TraceSet) -> dict[str, Any]:
    return {"without_guard": behaviour(free, traces, False), "with_guard": behaviour(heads, traces, True)}


def of_kinds(traces: TraceSet, kinds: list[str], inside: bool) -> TraceSet:
    return traces.select([i for i, kind in enumerate(traces.kinds) if (kind in kinds) == inside])


def calibrated(train: TraceSet, held_out: TraceSet, guard: float | None) -> ExitHeads:
    heads = fit_heads(train, FitSettings(guard=guard, epochs=20), progress=False)
    calibrate(heads, held_out, ALPHA)
    return heads


def main() -> None:
    torch.set_num_threads(1)
    train, held_out, test = (load_traces(RUNS / name) for name in ("train", "calibration", "test"))
    guard = ExitHeads.from_pretrained(ROOT / "checkpoints/reference-heads").config.guard
    groups = [
        ["arithmetic"],
        ["digit_at", "digit_of"],
        ["colour_at", "colour_of"],
        ["count_digit", "count_colour"],
        ["any_digit", "any_colour"],
        ["largest"],
        ["left_of"],
        ["read_row"],
    ]
    kinds = {}
    for group in groups:
        seen, known = of_kinds(train, group, False), of_kinds(held_out, group, False)
        heads, free = calibrated(seen, known, guard), calibrated(seen, known, None)
        kinds[" + ".join(group)] = {
            "held_out_kinds": both(heads, free, of_kinds(test, group, True)),
            "known_kinds": both(heads, free, of_kinds(test, group, False)),
        }
        print(group, kinds[" + ".join(group)]["held_out_kinds"], flush=True)
    heads, free = calibrated(train, held_out, guard), calibrated(train, held_out, None)
    styles = {"plain": both(heads, free, test)}
    for style in ("negative", "noisy"):
        styles[style] = both(heads, free, load_traces(RUNS / style))
    record(
        "guard",
        {"command": "python benchmarks/guard.py", "alpha": ALPHA, "guard": guard, "kinds": kinds, "styles": styles},
    )


if __name__ == "__main__":
    main()
