"""What makes heads bolder at the same risk: one change at a time, on the same traces.

Each variant is trained, calibrated at alpha = 1 % on held-out traces and judged on a third set; its oracle share is
the visual-layer compute it saves over what the earliest agreeing exit of each sample saves.

    python benchmarks/heads_ablation.py    # after `make traces`
"""

from __future__ import annotations

from pathlib import Path

import torch
from shapes import record

from dyvte.training.calibrate import calibrate, compare
from dyvte.training.fit import FitSettings, fit_heads, quality
from dyvte.training.store import load_traces

RUNS = Path(__file__).parents[1] / "runs/traces"
VARIANTS = {
    "shipped": {},
    "no guard": {"guard": None},
    "stricter guard (95 % pass)": {"guard": 0.95},
    "no dropout": {"dropout": 0.0},
    "dropout 0.5": {"dropout": 0.5},
    "trunk 32 wide": {"width": 32},
    "trunk 256 wide": {"width": 256},
    "twice the epochs": {"epochs": 60},
    "asked one layer ahead": {"lookahead": 1},
    "a fifth of the traces": {"share": 0.2},
    "published form": {"form": "original", "width": 2048, "epochs": 12, "lr": 3e-4, "dropout": 0.0},
    "published form, published label rule": {
        "form": "original",
        "width": 2048,
        "epochs": 12,
        "lr": 3e-4,
        "dropout": 0.0,
        "label_rule": "original",
    },
}
SEEDS = (0, 1)


def main() -> None:
    torch.set_num_threads(1)
    train, held_out, test = (load_traces(RUNS / name) for name in ("train", "calibration", "more"))
    rows = []
    for name, changes in VARIANTS.items():
        changes = dict(changes)
        some = train.select(range(round(changes.pop("share", 1.0) * len(train))))
        found = []
        for seed in SEEDS if changes.get("form") != "original" else SEEDS[:1]:
            heads = fit_heads(some, FitSettings(**{"epochs": 30, "seed": seed} | changes), progress=False)
            calibrate(heads, held_out, alpha=0.01)
            result = compare(heads, test)["learned"]
            mean = quality(heads, test, "agreement")["mean"]
            found.append((result["oracle_share"], 1 - result["agreement"], mean["auroc"], mean["log_loss"]))
        shares = [row[0] for row in found]
        average = [sum(column) / len(found) for column in zip(*found)]
        rows.append(
            {
                "variant": name,
                "oracle_share": average[0],
                "oracle_share_range": [min(shares), max(shares)],
                "changed": average[1],
                "auroc": average[2],
                "log_loss": average[3],
                "parameters": sum(p.numel() for p in heads.parameters()),
                "seeds": len(found),
            }
        )
        print(rows[-1], flush=True)
    sizes = {"train": len(train), "calibration": len(held_out), "test": len(test)}
    record("heads_ablation", {"command": "python benchmarks/heads_ablation.py", "traces": sizes, "rows": rows})


if __name__ == "__main__":
    main()
