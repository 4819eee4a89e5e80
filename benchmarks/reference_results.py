"""The figures and the table of the README, from committed JSON; ``--collect`` makes that JSON from runs.

python benchmarks/reference_results.py --collect   # after `make traces heads evaluation`
python benchmarks/reference_results.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/reference.json"
FIGURE = ROOT / "docs/figures/reference.png"
README = ROOT / "README.md"
MARKS = ("<!-- table: python benchmarks/reference_results.py -->", "<!-- end of table -->")
BLUE, RED, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#888888"


def collect() -> None:
    """Traces and evaluation -> one JSON file that holds everything shown."""
    from dyvte.calibration import compare, oracle_exits, risk_curve
    from dyvte.fitting import probability_of, quality
    from dyvte.heads import ExitHeads
    from dyvte.traces import load_traces

    heads = ExitHeads.from_pretrained(ROOT / "checkpoints/reference-heads")
    traces = load_traces(ROOT / "runs/traces/test")
    summary = json.loads((ROOT / "runs/evaluation/summary.json").read_text())
    same = traces.agreement >= 1
    curve = risk_curve(probability_of(heads, traces.state), same, points=200)
    possible = (traces.num_layers - oracle_exits(same)).double().mean()
    keep = ("n", "score", "stderr", "agreement", "agreement_stderr", "mean_exit_layer", "exit_layers")
    keep += ("visual_layers_removed", "flops_removed", "kv_bytes_removed", "timing")
    policies = {}
    for name, values in summary["policies"].items():
        policies[name] = {key: values[key] for key in keep if key in values}
        policies[name]["by_kind"] = {
            kind: {key: row[key] for key in ("agreement", "mean_exit_layer", "exit_layers", "score") if key in row}
            for kind, row in values["by_kind"].items()
        }
    result = {
        "command": "make traces heads evaluation && python benchmarks/reference_results.py --collect",
        "samples": len(traces),
        "layers": traces.num_layers,
        "heads": {"threshold": heads.config.threshold, "calibration": heads.config.calibration},
        "from_traces": compare(heads, traces),
        "curve": {
            "agreement": (1 - curve.risk).tolist(),
            "oracle_share": ((traces.num_layers - curve.exit_layer) / possible).tolist(),
        },
        "quality": quality(heads, traces)["mean"],
        "policies": policies,
        "versions": summary["versions"],
        "hardware": summary["hardware"],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def label(name: str, layers: int) -> str:
    if name.startswith("fixed-"):
        return f"fixed exit at layer {name.split('-')[1]} of {layers}"
    return {"learned": "**exit heads**", "oracle": "oracle (earliest exit that agrees)", "random": "random exit"}.get(
        name, name
    )


def table(result: dict[str, Any]) -> str:
    """At most eight rows: what each policy keeps and saves on the same questions."""
    oracle = result["from_traces"]["oracle"]["mean_exit_layer"]
    layers = result["layers"]
    titles = ("policy", "right", "same answer as dense", "mean exit layer", "of the oracle's savings")
    titles += ("prefill FLOPs", "prefill time")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    order = ["dense", "learned", "oracle", *(n for n in result["policies"] if n.startswith("fixed")), "random"]
    for name in order:
        row = result["policies"][name]
        share = (layers - row["mean_exit_layer"]) / (layers - oracle)
        timing = row.get("timing")
        cells = [
            label(name, layers),
            f"{100 * row['score']:.1f} %",
            f"{100 * row['agreement']:.2f} %",
            "never" if name == "dense" else f"{row['mean_exit_layer']:.1f}",
            f"{100 * share:.0f} %",
            f"−{100 * row['flops_removed']:.0f} %",
            f"{timing['prefill_ratio']:.2f}×" if timing else "1",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(result: dict[str, Any]) -> None:
    layers, trace = result["layers"], result["from_traces"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=[1.1, 1])
    curve = result["curve"]
    points = sorted(zip(curve["oracle_share"], curve["agreement"]))
    left.plot(
        [100 * s for s, _ in points], [100 * a for _, a in points], color=BLUE, label="exit heads, all thresholds"
    )
    chosen = trace["learned"]
    left.plot(100 * chosen["oracle_share"], 100 * chosen["agreement"], "o", color=BLUE, label="shipped threshold")
    fixed = trace["fixed"][:-1]
    left.plot([100 * f["oracle_share"] for f in fixed], [100 * f["agreement"] for f in fixed], "s--", color=RED,
              markersize=4, linewidth=1, label="one fixed exit layer")  # fmt: skip
    for e, f in enumerate(fixed, start=1):
        if f["agreement"] > 0.5:
            place = (100 * f["oracle_share"], 100 * f["agreement"])
            left.annotate(str(e), place, textcoords="offset points", xytext=(5, 2), fontsize=7, color=RED)
    left.plot(100, 100, "*", markersize=12, color=GREEN, label="oracle")
    left.axhline(99, color=GREY, linewidth=0.8, linestyle=":")
    left.set(xlim=(-2, 135), ylim=(50, 101), ylabel="same answer as dense, %")
    left.set(xlabel="visual-layer compute saved, % of what the oracle saves")
    left.set_title(f"{result['samples']:,} held-out questions", fontsize=10)
    left.legend(fontsize=8, loc="lower left")
    kinds = result["policies"]["learned"]["by_kind"]
    oracle = trace["by_kind"]
    order = sorted(kinds, key=lambda kind: kinds[kind]["mean_exit_layer"])
    for y, kind in enumerate(order):
        counts = kinds[kind]["exit_layers"]
        for e, count in enumerate(counts, start=1):
            if count:
                right.scatter(e, y, s=260 * count / sum(counts), color=BLUE, alpha=0.75, linewidths=0)
        right.plot(oracle[kind]["oracle_exit_layer"], y, "|", color=GREEN, markersize=13, markeredgewidth=2)
    right.plot([], [], "o", color=BLUE, label="exit heads (area: share of questions)")
    right.plot([], [], "|", color=GREEN, markersize=11, markeredgewidth=2, label="oracle, mean")
    right.set_yticks(range(len(order)), [kind.replace("_", " ") for kind in order], fontsize=8)
    right.set_xticks(range(1, layers + 1), [*map(str, range(1, layers)), "never"])
    right.set(xlim=(0.5, layers + 0.5), xlabel="exit layer (layers that see the image)")
    right.set_title("where the visual tokens leave, by kind of question", fontsize=10)
    right.legend(fontsize=8, loc="lower right")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=130)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--collect", action="store_true", help="make the JSON from runs/ first")
    if options.parse_args().collect:
        collect()
    result = json.loads(RESULT.read_text())
    draw(result)
    before, rest = README.read_text().split(MARKS[0])
    README.write_text(f"{before}{MARKS[0]}\n{table(result)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


if __name__ == "__main__":
    main()
