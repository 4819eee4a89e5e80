"""The figures and the table of the README, from committed JSON; ``--collect`` makes that JSON from runs.

python benchmarks/reference_results.py --collect   # after `make traces heads evaluation`
python benchmarks/reference_results.py
"""

from __future__ import annotations

import argparse
import json
import re
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
    from dyvte.heads import ExitHeads
    from dyvte.training.calibrate import compare, oracle_exits, risk_curve
    from dyvte.training.fit import probability_of, quality
    from dyvte.training.store import load_traces

    heads = ExitHeads.from_pretrained(ROOT / "checkpoints/reference-heads")
    traces = load_traces(ROOT / "runs/traces/test")
    summary = json.loads((ROOT / "runs/evaluation/summary.json").read_text())
    same = traces.agreement >= 1
    curve = risk_curve(probability_of(heads, traces), same, points=200)
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


NAMES = {
    "dense": "dense",
    "learned": "**exit heads, α = 1 %**",
    "oracle": "oracle: earliest exit that agrees",
    "learned-dyvte": "DyVTE: its form, label rule, argmax",
    "vtw": "VTW: one layer by KL",
    "fastv-50": "FastV: half from layer 2 on",
    "prune-50": "random half from layer 2 on",
    "random": "random exit",
}
SHOWN = ("dense", "learned", "oracle", "best fixed", "learned-dyvte", "vtw", "fastv-50", "prune-50")


def best_fixed(result: dict[str, Any]) -> str:
    """The fixed exit layer that saves most while as many answers stay the same as the heads promise."""
    fixed = {name: row for name, row in result["policies"].items() if name.startswith("fixed-")}
    good = [name for name, row in fixed.items() if row["agreement"] >= 0.99]
    return min(good, key=lambda name: fixed[name]["mean_exit_layer"])


def table(result: dict[str, Any]) -> str:
    """At most eight rows: what each policy keeps and saves on the same questions."""
    saved = {name: row["visual_layers_removed"] for name, row in result["policies"].items()}
    titles = ("policy", "right", "same answer as dense", "visual-token layers", "of the oracle's savings")
    titles += ("prefill FLOPs", "prefill time", "of its decoder")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name in SHOWN:
        title = NAMES.get(name)
        if name == "best fixed":
            name = best_fixed(result)
            title = f"best fixed exit (layer {name.split('-')[1]} of {result['layers']})"
        row = result["policies"][name]
        timing = row.get("timing")
        cells = [title, f"{100 * row['score']:.1f} %", f"{100 * row['agreement']:.2f} %"]
        cells += [f"−{100 * saved[name]:.0f} %", f"{100 * saved[name] / saved['oracle']:.0f} %"]
        cells += [f"−{100 * row['flops_removed']:.0f} %"]
        cells += [f"{timing['prefill_ratio']:.2f}×", f"{timing['decoder_ratio']:.2f}×"] if timing else ["1", "1"]
        lines.append("| " + " | ".join(cells if name != "dense" else [*cells[:3], *["–"] * 3, *cells[6:]]) + " |")
    return "\n".join(lines)


def draw(result: dict[str, Any]) -> None:
    layers, trace = result["layers"], result["from_traces"]
    oracle_saves = 1 - trace["oracle"]["mean_exit_layer"] / layers
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    curve = result["curve"]
    points = sorted((100 * s * oracle_saves, 100 * a) for s, a in zip(curve["oracle_share"], curve["agreement"]))
    left.plot(*zip(*points), color=BLUE, label="exit heads, all thresholds")
    policies = result["policies"]
    styles = {
        "learned": ("o", BLUE, "exit heads, α = 1 %"),
        "oracle": ("*", GREEN, "oracle"),
        "learned-dyvte": ("D", "#cc79a7", "DyVTE recipe"),
        "vtw": ("^", "#e69f00", "VTW"),
        "fastv-exit-50": ("X", "#000000", "FastV, half, and exit heads"),
        "random": ("s", "#bbbbbb", "random exit"),
    }
    families = {
        "fixed": (RED, "one fixed exit layer"),
        "fastv": ("#56b4e9", "FastV, % kept"),
        "prune": (GREY, "random pruning, % kept"),
    }
    for axis, key in ((left, "agreement"), (middle, "score")):
        for family, (colour, title) in families.items():
            names = [n for n in policies if re.fullmatch(rf"{family}-\d+", n)]
            spots = sorted((100 * policies[n]["visual_layers_removed"], 100 * policies[n][key], n) for n in names)
            axis.plot([x for x, _, _ in spots], [y for _, y, _ in spots], ".--", color=colour, linewidth=1, label=title)
            for x, y, name in spots:
                place = {"textcoords": "offset points", "xytext": (3, -10)}
                axis.annotate(name.split("-")[1], (x, y), fontsize=7, color=colour, annotation_clip=True, **place)
        for name, (marker, colour, title) in styles.items():
            row = policies[name]
            place = (100 * row["visual_layers_removed"], 100 * row[key])
            axis.plot(*place, marker, color=colour, markersize=11 if marker == "*" else 7, label=title)
        axis.set(xlim=(0, 75), ylim=(60, 101.5), xlabel="visual-token layers removed, %")
    left.set_ylabel("same answer as dense, %")
    middle.set_ylabel("right answers, %")
    middle.axhline(100 * policies["dense"]["score"], color=GREY, linewidth=0.8, linestyle=":")
    left.set_title(f"{result['samples']:,} held-out questions: agreement", fontsize=10)
    middle.set_title("accuracy (dotted: dense)", fontsize=10)
    left.legend(fontsize=7.5, loc="lower left")
    kinds = policies["learned"]["by_kind"]
    oracle = trace["by_kind"]
    order = sorted(kinds, key=lambda kind: kinds[kind]["mean_exit_layer"])
    for y, kind in enumerate(order):
        counts = kinds[kind]["exit_layers"]
        for e, count in enumerate(counts, start=1):
            if count:
                right.scatter(e, y, s=220 * count / sum(counts), color=BLUE, alpha=0.75, linewidths=0)
        right.plot(oracle[kind]["oracle_exit_layer"], y, "|", color=GREEN, markersize=13, markeredgewidth=2)
    right.plot([], [], "o", color=BLUE, label="exit heads (area: share)")
    right.plot([], [], "|", color=GREEN, markersize=11, markeredgewidth=2, label="oracle, mean")
    right.set_yticks(range(len(order)), [kind.replace("_", " ") for kind in order], fontsize=8)
    right.set_xticks(range(1, layers + 1), [*map(str, range(1, layers)), "never"])
    right.set(xlim=(0.5, layers + 0.5), xlabel="exit layer (layers that see the image)")
    right.set_title("where the visual tokens leave, by kind of question", fontsize=10)
    right.legend(fontsize=7.5, loc="upper left")
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
