"""Is the promise kept? Thresholds chosen on one part of the traces, judged on the rest, over 500 random splits.

A split breaks its promise if the share of changed answers exceeds alpha among all the traces of the pool, or, more
severely since that share has an error of its own, among those that did not choose the threshold.

    python benchmarks/promise.py    # after `make traces`
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from shapes import RESULTS, record

from dyvte.heads import ExitHeads
from dyvte.promise import boldest_safe
from dyvte.training.calibrate import clopper_pearson, exits_at, oracle_exits, threshold_grid
from dyvte.training.fit import probability_of
from dyvte.training.store import load_traces

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
SPLITS, DELTA, CALIBRATION = 500, 0.1, 2000
ALPHAS = (0.005, 0.01, 0.02, 0.05)


def main() -> None:
    torch.set_num_threads(1)
    heads = ExitHeads.from_pretrained(ROOT / "checkpoints/reference-heads")
    traces = load_traces(*(ROOT / "runs/traces" / name for name in ("calibration", "test", "more")))
    probability, same = probability_of(heads, traces).double(), traces.agreement >= 1
    n, layers = probability.shape
    grid = threshold_grid()
    exits = torch.stack([exits_at(probability, t) for t in grid.tolist()])  # [thresholds, n]
    wrong = ~same.expand(len(grid), -1, -1).gather(2, exits[..., None] - 1).squeeze(2)
    possible = (layers - oracle_exits(same)).double().mean()
    share = (layers - exits.double()) / possible
    orders = [torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for seed in range(SPLITS)]
    rows = []
    for alpha in ALPHAS:
        risks, pool, shares = [], [], []
        for order in orders:
            held, test = order[:CALIBRATION], order[CALIBRATION:]
            bound = clopper_pearson(wrong[:, held].sum(1), CALIBRATION, DELTA)
            chosen = boldest_safe(bound.tolist(), alpha)
            risks.append(wrong[chosen, test].double().mean().item())
            pool.append(wrong[chosen].double().mean().item())
            shares.append(share[chosen, test].mean().item())
        broken, broken_pool = (sum(r > alpha for r in some) / SPLITS for some in (risks, pool))
        rows.append(
            {
                "alpha": alpha,
                "broken_on_the_rest": broken,
                "broken_on_the_pool": broken_pool,
                "standard_error": (max(broken, 1 / SPLITS) * (1 - broken) / SPLITS) ** 0.5,
                "mean_risk_on_the_rest": sum(risks) / SPLITS,
                "mean_oracle_share": sum(shares) / SPLITS,
                "risks": [round(r, 6) for r in sorted(risks)],
            }
        )
    result = {
        "command": "python benchmarks/promise.py",
        "splits": SPLITS,
        "delta": DELTA,
        "calibration_samples": CALIBRATION,
        "test_samples": n - CALIBRATION,
        "rows": rows,
    }
    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    parts = axis.violinplot([[r / row["alpha"] for r in row["risks"]] for row in rows], widths=0.8, showextrema=False)
    for body in parts["bodies"]:
        body.set(facecolor="#0072b2", alpha=0.6)
    axis.axhline(1, color="#d55e00", linewidth=1)
    for place, row in enumerate(rows, start=1):
        axis.text(
            place, 1.03, f"{100 * row['broken_on_the_rest']:.1f} % above", ha="center", fontsize=8, color="#d55e00"
        )
    axis.set_xticks(range(1, len(rows) + 1), [f"α = {100 * row['alpha']:g} %" for row in rows])
    axis.set(ylabel="changed answers ÷ α, on the rest", ylim=(0, None))
    axis.set_title(
        f"{SPLITS} random splits, {CALIBRATION:,} traces to calibrate, promised: at most 10 % above", fontsize=9
    )
    figure.savefig(RESULTS / "promise.png", dpi=130)
    record("promise", result)


if __name__ == "__main__":
    main()
