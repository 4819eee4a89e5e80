"""Small shared heads against the published form, trained on the same traces, judged on the same held-out ones.

Both forms train with the same optimizer and stop at their own best epoch; learning rate and dropout of each are chosen
from the same grid by log loss on its own validation split. Risk at alpha is measured after calibration on a third set
of traces.

    python benchmarks/heads_forms.py    # after `make traces`
"""

from __future__ import annotations

from pathlib import Path

import torch
from shapes import record

from dyvte.heads import ExitHeads, ExitHeadsConfig
from dyvte.training.calibrate import calibrate, compare
from dyvte.training.fit import FitSettings, fit_heads, quality
from dyvte.training.store import load_traces

RUNS = Path(__file__).parents[1] / "runs/traces"
FORMS = {"shared": {"width": 128}, "original": {"width": 2048}}
GRID = [(rate, dropout) for rate in (1e-3, 3e-3) for dropout in (0.0, 0.3)]


def main() -> None:
    torch.set_num_threads(1)
    train, held_out, test = (load_traces(RUNS / name) for name in ("train", "calibration", "test"))
    result: dict = {"command": "python benchmarks/heads_forms.py", "traces": [len(train), len(held_out), len(test)]}
    for form, shape in FORMS.items():
        epochs = 30 if form == "shared" else 12
        candidates = [
            fit_heads(train, FitSettings(form=form, epochs=epochs, lr=rate, dropout=dropout, **shape), progress=False)
            for rate, dropout in GRID
        ]
        heads = min(candidates, key=lambda h: h.config.training["validation_log_loss"])
        big = ExitHeadsConfig(num_layers=32, hidden_size=4096, form=form, guard=candidates[0].config.guard, **shape)
        with torch.device("meta"):
            at_7b = sum(p.numel() for p in ExitHeads(big).parameters())
        calibrate(heads, held_out)
        result[form] = quality(heads, test) | {
            "lr": heads.config.training["lr"],
            "dropout": heads.config.training["dropout"],
            "epoch": heads.config.training["best_epoch"],
            "parameters_at_llava_7b": at_7b,
            "at_alpha_1_percent": compare(heads, test)["learned"],
        }
    record("heads_forms", result)
    print("| exit layer | AUROC shared | AUROC original | log loss shared | log loss original |\n|---|---|---|---|---|")
    for a, b in zip(result["shared"]["layers"], result["original"]["layers"]):
        auroc = [f"{row['auroc']:.4f}" if row["auroc"] is not None else "–" for row in (a, b)]
        print(f"| {a['exit_layer']} | {' | '.join(auroc)} | {a['log_loss']:.4f} | {b['log_loss']:.4f} |")


if __name__ == "__main__":
    main()
