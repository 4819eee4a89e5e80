"""Runs of :mod:`dyvte.evaluation.runner` as one web page and as figures for a paper or an issue.

Reads every folder with a ``summary.json`` under a directory. A run's folder may also hold ``curve.json`` (lists
``threshold``, ``risk``, ``bound``, ``saved``; optionally ``alpha``, ``delta``, ``chosen``) and ``reliability.json``
(lists ``confidence``, ``frequency``, ``count``).
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from PIL import Image

DENSE = "dense"
# Okabe and Ito's palette: told apart by every kind of colour vision; markers tell them apart in grey.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
INK, FAINT = "#222222", "#9A9A9A"
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
}
MAX_KINDS = 16
SETTING = re.compile(r"^(?P<family>.+?)[-=@](?P<setting>[\d.]+%?)$")  # fixed-3, learned@0.9


@dataclass
class Run:
    """One evaluated folder: its summary, its rows by policy, and its name in the report."""

    folder: Path
    name: str
    summary: Mapping[str, Any]
    rows: Mapping[str, list[dict[str, Any]]]

    @property
    def layers(self) -> int:
        return self.summary["layers"]

    @property
    def policies(self) -> Mapping[str, Any]:
        return self.summary["policies"]

    def main_policy(self) -> str | None:
        """The policy whose exits and answers are shown: the first that decides per sample, learned ones first."""
        adaptive = [name for name, p in self.policies.items() if sum(count > 0 for count in p["exit_layers"]) > 1]
        order = sorted(adaptive, key=lambda name: name.startswith(("oracle", "random")) - name.startswith("learned"))
        others = [name for name in self.policies if name != DENSE]
        return (order or others or [None])[0]


@dataclass
class Section:
    """What the page shows of one run."""

    run: Run
    table: list[dict[str, str]] = field(default_factory=list)
    figures: list[tuple[str, str, float]] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    policy: str | None = None
    kinds: list[dict[str, str]] = field(default_factory=list)


def report(directory: str | os.PathLike, output: str | os.PathLike | None = None) -> Path:
    """Writes ``report.html``, which needs no other file, and its figures as PNGs.

    Args:
        directory: a run's folder, or one with runs in it.
        output: where to write; ``<directory>/report`` unless given.

    Returns:
        The path of the page.

    Raises:
        ValueError: there is no run in the directory.
    """
    directory = Path(directory)
    found = sorted(directory.rglob("summary.json")) if directory.is_dir() else []
    if not found:
        raise ValueError(f"no summary.json in {directory} or below: run `dyvte evaluate` with this output folder first")
    runs = [_read(path.parent, directory) for path in found]
    output = Path(output) if output is not None else directory / "report"
    output.mkdir(parents=True, exist_ok=True)
    overview: list[tuple[str, str]] = []
    with matplotlib.rc_context(STYLE):
        sections = [_section(run, output, prefix=f"{_slug(run.name)}-" if len(runs) > 1 else "") for run in runs]
        if len(runs) > 1:
            bars = {run.name: run.policies[run.main_policy()]["exit_layers"] for run in runs if run.main_policy()}
            same_depth = {name: counts for name, counts in bars.items() if len(counts) == runs[0].layers}
            if same_depth:
                path = output / "exit-layers-by-task.png"
                plot_exit_layers(same_depth).savefig(path)
                overview.append((_embed(path), "Exit layers per task: after how many layers visual tokens left."))
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    path = output / "report.html"
    path.write_text(
        page.render(sections=sections, overview=overview, columns=COLUMNS, kind_columns=KIND_COLUMNS), encoding="utf-8"
    )
    return path


def _read(folder: Path, root: Path) -> Run:
    summary = json.loads((folder / "summary.json").read_text())
    rows = {}
    for name in summary["policies"]:
        path = folder / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows[name] = sorted(map(json.loads, lines), key=lambda row: row["index"])
    return Run(folder, folder.name if folder == root else str(folder.relative_to(root)), summary, rows)


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)


def _embed(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _section(run: Run, output: Path, prefix: str) -> Section:
    section = Section(run, policy=run.main_policy())

    def add(figure: Figure | None, name: str, caption: str) -> None:
        if figure is not None:
            path = output / f"{prefix}{name}.png"
            figure.savefig(path)
            section.figures.append((_embed(path), caption, figure.get_figwidth() * 6.2))

    section.table = [_table_row(name, values) for name, values in run.policies.items()]
    section.facts = _facts(run)
    if section.policy is not None:
        dense_by_kind = run.policies[DENSE].get("by_kind") or {}
        for kind, values in (run.policies[section.policy].get("by_kind") or {}).items():
            full = _table_row(kind, dense_by_kind[kind])
            section.kinds.append(_table_row(kind, values) | {"n": str(values["n"]), "dense": full["score"]})
    metric = run.summary["settings"]["metric"].replace("_", " ")
    batch = run.summary["settings"]["batch_size"]
    costs = "Cost: FLOPs of the decoder over the prompt"
    if _timed(run):
        costs = "Left: measured prefill time (vision tower included, median, each policy in turn with the dense model, "
        costs += f"batch of {batch}). Right: FLOPs of the decoder over the prompt"
    notes = f"{costs}. Bars: standard error; grey steps: the best at each cost, but for the oracle."
    if len(run.policies) > 1 and run.policies[DENSE].get("score") is not None:
        add(plot_tradeoff(run, "score", metric), "score", f"Score ({metric}). {notes}")
    caption = f"Answers that differ from the dense model's; upper left is better. {notes}"
    if len(run.policies) > 1:
        add(plot_tradeoff(run, "changed", "changed answers"), "changed", caption)
    main = section.policy
    if main is not None:
        kinds = run.policies[main].get("by_kind") or {"all": run.policies[main]}
        bars = {kind: values["exit_layers"] for kind, values in kinds.items()}
        caption = (
            f"Exit layers of {main} per kind of question: after how many layers the visual tokens left. Line: mean."
        )
        add(plot_exit_layers(bars), "exit-layers", caption)
    curve, reliability = run.folder / "curve.json", run.folder / "reliability.json"
    if curve.exists():
        caption = "Share of changed answers against the threshold, with its upper confidence bound, and what is saved."
        add(plot_risk(json.loads(curve.read_text())), "risk", caption)
    if reliability.exists():
        caption = "Reliability of the heads: how often an exit agreed, against how sure they were. Area: samples."
        add(plot_reliability(json.loads(reliability.read_text())), "reliability", caption)
    if main is not None:
        cards = example_cards(run, main)
        if cards:
            figure = plot_examples(cards, run.layers)
            figure.savefig(output / f"{prefix}examples.png")
        section.examples = [card | {"image": _embed(card["picture"])} for card in cards]
    return section


COLUMNS = [
    ("policy", "policy"),
    ("score", "score"),
    ("agreement", "same answer"),
    ("changed", "changed"),
    ("exit", "mean exit"),
    ("visual", "visual layers removed"),
    ("flops", "FLOPs removed"),
    ("cache", "KV cache removed, sample by sample"),
    ("prefill", "prefill time"),
    ("decoder", "its decoder part"),
    ("decode", "decode time"),
]


KIND_COLUMNS = [
    ("policy", "kind"),
    ("n", "samples"),
    ("dense", "dense score"),
    ("score", "score"),
    ("agreement", "same answer"),
    ("exit", "mean exit"),
    ("flops", "FLOPs removed"),
]


def _table_row(name: str, values: Mapping[str, Any]) -> dict[str, str]:
    timing = values.get("timing") or {}
    decode = timing.get("decode_seconds") or {}
    score = values.get("score")
    error = values.get("stderr")
    return {
        "policy": name,
        "score": "–" if score is None else f"{100 * score:.1f}" + (f" ± {100 * error:.1f}" if error else ""),
        "agreement": f"{100 * values['agreement']:.1f} %",
        "changed": f"{values['disagreements']} of {values['n']}",
        "exit": f"{values['mean_exit_layer']:.2f}",
        "visual": _percent(values["visual_layers_removed"]),
        "flops": _percent(values["flops_removed"]),
        "cache": _percent(values["kv_bytes_removed"]),
        "prefill": f"× {timing['prefill_ratio']:.2f}" if timing else "–",
        "decoder": f"× {timing['decoder_ratio']:.2f}" if timing.get("decoder_ratio") else "–",
        "decode": f"× {decode['exit'] / decode[DENSE]:.2f}" if decode and decode[DENSE] > 0 else "–",
    }


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _facts(run: Run) -> list[tuple[str, str]]:
    settings, versions, hardware = (run.summary[key] for key in ("settings", "versions", "hardware"))
    dense, threads = run.policies[DENSE], hardware["threads"]
    text = sum(row["text_tokens"] for row in run.rows[DENSE]) / max(len(run.rows[DENSE]), 1)
    visual = sum(row["visual_tokens"] for row in run.rows[DENSE]) / max(len(run.rows[DENSE]), 1)
    return [
        ("model", f"{settings['model_name'] or settings['model']['class']}, {settings['model']['dtype']}"),
        ("decoder", f"{run.layers} layers; {visual:.0f} visual and {text:.0f} text tokens per prompt"),
        ("samples", f"{dense['n']}, scored by {settings['metric'].replace('_', ' ')}"),
        ("hardware", f"{hardware['name']}, {threads} thread{'s' * (threads > 1)}, batch of {settings['batch_size']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
    ]


def _timed(run: Run) -> bool:
    return any(values.get("timing") for values in run.policies.values())


# Figures.


def plot_tradeoff(run: Run, quantity: str, label: str) -> Figure:
    """``score`` or ``changed`` of every policy against measured prefill time, where there is any, and prefill FLOPs.

    Upper left is better in both; changed answers are on a logarithmic axis that points down.
    """
    costs = [("decoder prefill FLOPs, share of dense", _flops_left)]
    if _timed(run):
        costs.insert(0, ("measured prefill time, share of dense", _time_left))
    figure = Figure(figsize=(3.5 * len(costs) + 0.2, 3.7), layout="constrained")
    axes = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    floor = 0.5 / run.policies[DENSE]["n"]  # where no changed answer at all is drawn
    families = _families([name for name in run.policies if name != DENSE])
    for axis, (cost_label, cost) in zip(axes, costs):
        points = []
        if quantity == "changed":
            axis.set_yscale("log")
            axis.axhline(max(0.01, floor), color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        for i, (family, members) in enumerate(families.items()):
            known = [(cost(run.policies[name]), *_value(run.policies[name], quantity, floor)) for name, _ in members]
            known = sorted(item for item in known if item[0] is not None and item[1] is not None)
            if not known:
                continue
            x, y, below, above = zip(*known)
            if family != "oracle":  # it knows the answers
                points += zip(x, y)
            look = {"color": COLOURS[i % len(COLOURS)], "zorder": 3}
            axis.errorbar(x, y, yerr=(below, above), fmt="none", elinewidth=0.9, alpha=0.6, **look)
            marks = {"marker": MARKERS[i % len(MARKERS)], "markersize": 6, "markeredgecolor": "white"}
            axis.plot(x, y, linewidth=1.1 if len(known) > 1 else 0, label=family, markeredgewidth=0.6, **marks, **look)
        if quantity != "changed":
            dense = run.policies[DENSE][quantity]
            points.append((1.0, dense))
            axis.axhline(dense, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
            axis.plot(1, dense, "*", color=INK, markersize=12, markeredgecolor="white", label=DENSE, zorder=4)
        front = _front(points, lower_is_better=quantity == "changed")
        if front:
            axis.step(*zip(*front), where="post", color="#B5B5B5", linewidth=1.4, zorder=2)
        axis.set_xlabel(cost_label)
        axis.xaxis.set_major_formatter(PER_CENT)
        axis.margins(0.06, 0.08)
    axes[0].yaxis.set_major_formatter(PER_CENT)
    if quantity == "changed":
        lowest, highest = floor / 1.6, max(1.0, axes[0].get_ylim()[1])
        ticks = [10.0**-k for k in range(5) if 3 * floor < 10.0**-k]
        axes[0].set_yticks([*ticks, floor], [*(_per_cent(tick) for tick in ticks), "none"])
        axes[0].yaxis.set_minor_locator(NullLocator())
        axes[0].set_ylim(highest, lowest)
    axes[0].set_ylabel(label)
    handles, labels = axes[-1].get_legend_handles_labels()
    columns = {"ncols": min(max(len(labels), 1), 7), "columnspacing": 1.4, "handletextpad": 0.4}
    figure.legend(handles, labels, loc="outside lower center", **columns)
    figure.draw_without_rendering()  # fixes the places that labels have to keep clear of
    for axis in axes:
        _label_settings(axis, families)
    return figure


def _flops_left(values: Mapping[str, Any]) -> float:
    return 1 - values["flops_removed"]


def _time_left(values: Mapping[str, Any]) -> float | None:
    return values["timing"]["prefill_ratio"] if values.get("timing") else None


def _value(values: Mapping[str, Any], quantity: str, floor: float) -> tuple[float | None, float, float]:
    """A quantity and the lengths of its error bar below and above."""
    if quantity == "changed":
        changed, error = 1 - values["agreement"], values["agreement_stderr"]
        shown = max(changed, floor)
        return shown, shown - max(changed - error, floor), max(changed + error - shown, 0.0)
    error = values.get("stderr") or 0.0
    return values.get(quantity), error, error


def _per_cent(value: float, _: Any = None) -> str:
    return f"{round(100 * value, 6):g} %"


PER_CENT = FuncFormatter(_per_cent)


def _families(names: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Policies that differ in one number belong together: name and setting by family."""
    matches = {name: SETTING.match(name) for name in names}
    sizes = Counter(match["family"] for match in matches.values() if match)
    families: dict[str, list[tuple[str, str]]] = {}
    for name, match in matches.items():
        if match is None or sizes[match["family"]] == 1:
            families[name] = [(name, match["setting"] if match else "")]
        else:
            family = f"{match['family']}, swept" if match["family"] in names else match["family"]
            families.setdefault(family, []).append((name, match["setting"]))
    return families


def _label_settings(axis: Axes, families: Mapping[str, list[tuple[str, str]]]) -> None:
    """Writes the settings of a family beside its points, leaving out those that would touch another."""
    taken: list[tuple[float, float]] = []
    for line in axis.get_lines():
        settings = [setting.rstrip("%") for _, setting in families.get(line.get_label(), [])]
        points = list(zip(line.get_xdata(), line.get_ydata()))
        # Points are sorted by cost, and cost rises with the setting of a family.
        names = sorted(settings, key=float) if len(settings) > 1 and all(settings) else []
        if len(names) != len(points):
            continue
        for i in [0, len(points) - 1, *range(1, len(points) - 1)]:
            x, y = axis.transData.transform(points[i]) / axis.figure.dpi * 72
            if all(abs(x - a) > 22 or abs(y - b) > 10 for a, b in taken):
                taken.append((x, y))
                options = {"xytext": (5, -9), "textcoords": "offset points", "fontsize": 7, "zorder": 5}
                axis.annotate(names[i], points[i], color=line.get_color(), **options)


def _front(points: Sequence[tuple[float, float]], lower_is_better: bool = False) -> list[tuple[float, float]]:
    """The points that nothing cheaper matches, by rising cost."""
    sign = -1 if lower_is_better else 1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    if front:
        front.append((max(x for x, _ in points), front[-1][1]))
    return front


def plot_exit_layers(bars: Mapping[str, Sequence[int]]) -> Figure:
    """One row of bars per kind of question: the share of its samples that exits after 1 ... L layers."""
    largest = sorted(bars, key=lambda kind: -sum(bars[kind]))[:MAX_KINDS]
    shares = {kind: [count / max(sum(bars[kind]), 1) for count in bars[kind]] for kind in bars if kind in largest}
    means = {kind: sum((i + 1) * share for i, share in enumerate(s)) for kind, s in shares.items()}
    order = sorted(shares, key=lambda kind: means[kind])
    layers = len(next(iter(shares.values())))
    figure = Figure(figsize=(5.6, 0.9 + 0.36 * len(order)), layout="constrained")
    figure.get_layout_engine().set(hspace=0, h_pad=0.01)
    axes = figure.subplots(len(order), 1, sharex=True, squeeze=False)[:, 0]
    top = max(max(s) for s in shares.values())
    for axis, kind in zip(axes, order):
        axis.bar(range(1, layers + 1), shares[kind], width=0.82, color=COLOURS[0], zorder=2)
        axis.axvline(means[kind], color=COLOURS[1], linewidth=1.6, zorder=3)
        axis.set_ylim(0, top * 1.04)
        axis.set_yticks([])
        axis.grid(False)
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="x", length=0, labelbottom=False)
        axis.set_ylabel(kind.replace("_", " "), rotation=0, ha="right", va="center", labelpad=8)
        axis.text(1.01, 0.5, f"{means[kind]:.1f}", transform=axis.transAxes, va="center", color=COLOURS[1])
    axes[0].text(1.01, 1.12, "mean", transform=axes[0].transAxes, va="bottom", color=COLOURS[1], fontsize=8)
    axes[-1].tick_params(axis="x", length=3, labelbottom=True)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(layers, 12)))
    axes[-1].set_xlim(0.4, layers + 0.6)
    axes[-1].set_xlabel(f"layers that saw the visual tokens ({layers} = they never left)")
    return figure


def plot_risk(curve: Mapping[str, Any]) -> Figure:
    """Risk with its bound, and the share of visual-token layers saved, against the threshold."""
    _check_lists(curve, "curve.json", ("threshold", "risk", "bound", "saved"))
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    threshold = curve["threshold"]
    upper.fill_between(threshold, curve["risk"], curve["bound"], color=COLOURS[0], alpha=0.18, linewidth=0)
    bound = "upper bound" if "delta" not in curve else f"upper bound, {100 * (1 - curve['delta']):.0f} % confidence"
    upper.plot(threshold, curve["bound"], color=COLOURS[0], linewidth=1.0, linestyle=(0, (4, 2)), label=bound)
    upper.plot(threshold, curve["risk"], color=COLOURS[0], linewidth=1.6, label="changed answers")
    lower.plot(threshold, curve["saved"], color=COLOURS[2], linewidth=1.6)
    if curve.get("alpha") is not None:
        upper.axhline(curve["alpha"], color=COLOURS[1], linewidth=1.0, label=f"asked: {100 * curve['alpha']:g} %")
    if curve.get("chosen") is not None:
        for axis in (upper, lower):
            axis.axvline(curve["chosen"], color=INK, linewidth=0.8, linestyle=":")
        lower.text(curve["chosen"], 1.0, " chosen", transform=lower.get_xaxis_transform(), va="top", fontsize=8)
    inside = [t for t in threshold if 0 < t < 1]
    if inside and sorted(inside)[len(inside) // 2] > 0.9:  # almost everything happens close to 1
        lower.set_xscale("logit")
        lower.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
        lower.xaxis.set_minor_formatter(NullFormatter())
    upper.set_ylabel("changed answers")
    lower.set_ylabel("visual layers\nsaved")
    lower.set_xlabel("threshold: probability of agreement that must be exceeded to exit")
    for axis in (upper, lower):
        axis.yaxis.set_major_formatter(PER_CENT)
        axis.set_ylim(bottom=0)
    upper.legend(loc="upper right", frameon=True, facecolor="white", edgecolor="none", framealpha=1, borderpad=0.2)
    figure.align_ylabels()
    return figure


def plot_reliability(table: Mapping[str, Any]) -> Figure:
    """How often exits agreed against how sure the heads were."""
    _check_lists(table, "reliability.json", ("confidence", "frequency", "count"))
    kept = [(c, f, n) for c, f, n in zip(table["confidence"], table["frequency"], table["count"]) if n > 0]
    figure = Figure(figsize=(3.6, 3.7), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1, label="as sure as right")
    if kept:
        confidence, frequency, count = zip(*kept)
        axis.plot(confidence, frequency, color=COLOURS[0], linewidth=1.1, zorder=2)
        area = [14 + 160 * n / max(count) for n in count]
        axis.scatter(
            confidence, frequency, s=area, color=COLOURS[0], edgecolor="white", linewidth=0.7, zorder=3, clip_on=False
        )
    axis.legend(loc="upper left")
    axis.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axis.set_xlabel("probability of agreement the heads gave")
    axis.set_ylabel("share that agreed")
    return figure


def _check_lists(content: Mapping[str, Any], name: str, keys: Sequence[str]) -> None:
    missing = [key for key in keys if not isinstance(content.get(key), list)]
    lengths = {len(content[key]) for key in keys if key not in missing}
    if missing or len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"{name} must hold lists of one length, {', '.join(keys)}; missing: {missing or 'none'}")


# Examples.


def example_cards(run: Run, policy: str, count: int = 12) -> list[dict[str, Any]]:
    """Samples with a picture: one of every kind in turn, then (a third, if there are any) changed answers.

    Each has ``picture`` (a path), ``question``, ``dense``, ``exit``, ``layer``, ``agrees``, ``right``, ``kind``.
    """
    dense = {row["id"]: row for row in run.rows[DENSE]}
    shown, changed, seen = [], [], {}
    for row in run.rows[policy]:
        picture = run.folder / "images" / f"{row['index']}.png"
        if row["id"] not in dense or not picture.exists():
            continue
        full = dense[row["id"]]
        card = {
            "picture": picture,
            "kind": row["kind"],
            "question": row["question"],
            "answers": list(dict.fromkeys(row["answers"])),
            "dense": full["answer"],
            "exit": row["answer"],
            "layer": row["exit_layer"],
            "agrees": row["agrees"],
        }
        if row["agrees"]:
            seen[row["kind"]] = seen.get(row["kind"], 0) + 1
            shown.append((seen[row["kind"]], row["index"], card))
        else:
            changed.append(card)
    shown.sort(key=lambda item: item[:2])
    changed = changed[: count // 3]
    return [card for _, _, card in shown[: count - len(changed)]] + changed


def plot_examples(cards: Sequence[Mapping[str, Any]], layers: int, columns: int = 4) -> Figure:
    """Pictures with question, answers and exit layer."""
    rows = math.ceil(len(cards) / columns)
    figure = Figure(figsize=(1.95 * columns, 2.75 * rows), layout="constrained")
    for axis, card in itertools.zip_longest(figure.subplots(rows, columns, squeeze=False).flat, cards):
        axis.set_axis_off()
        if card is None:
            continue
        with Image.open(card["picture"]) as picture:
            axis.imshow(picture.convert("RGB"))
        axis.set_title(_wrap(card["question"], 30), fontsize=8, fontweight="normal")
        answer = card["exit"] if card["agrees"] else f"{card['dense']} → {card['exit']}"
        colour = INK if card["agrees"] else COLOURS[1]
        axis.text(0, -0.04, _wrap(answer, 26), transform=axis.transAxes, va="top", fontweight="bold", color=colour)
        axis.text(
            1, -0.04, f"layer {card['layer']} of {layers}", transform=axis.transAxes, va="top", ha="right", fontsize=8
        )
        bar = axis.inset_axes((0, -0.2, 1, 0.04))
        bar.barh([0], [layers], color="#E4E4E4")
        bar.barh([0], [card["layer"]], color=COLOURS[0])
        bar.set_xlim(0, layers)
        bar.set_axis_off()
    return figure


def _wrap(text: str, width: int, lines: int = 3) -> str:
    words, out = text.split(), [""]
    for word in words:
        if len(out[-1]) + len(word) + 1 > width and out[-1]:
            out.append("")
        out[-1] = f"{out[-1]} {word}".strip()
    return "\n".join(out[:lines]) + (" …" if len(out) > lines else "")


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>dyvte report</title>
<style>
:root { --ink: #222; --quiet: #666; --line: #ddd; --blue: #0072b2; --red: #d55e00; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 62rem; margin: 2.5rem auto;
  padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 .75rem; }
.quiet, figcaption, dt { color: var(--quiet); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .87rem; margin: .5rem 0 1rem; }
dd { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; width: 100%; }
th { font-weight: 600; text-align: right; border-bottom: 1.5px solid var(--ink); padding: .3rem .6rem;
  vertical-align: bottom; }
td { text-align: right; border-bottom: 1px solid var(--line); padding: .3rem .6rem; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
figure { margin: 1.75rem 0; break-inside: avoid; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .87rem; margin-top: .4rem; max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: 6px; overflow: hidden; font-size: .87rem; break-inside: avoid; }
.card img { width: 100%; height: 10rem; object-fit: contain; background: #f4f4f4; display: block; }
.card div { padding: .5rem .7rem .7rem; }
.card p { margin: 0 0 .3rem; white-space: pre-line; }
.changed { color: var(--red); }
.track { display: block; height: 5px; background: #e4e4e4; border-radius: 3px; margin-top: .4rem; }
.track i { display: block; height: 5px; background: var(--blue); border-radius: 3px; }
@media print {
  body { margin: 0; max-width: none; font-size: 11px; }
  .cards { grid-template-columns: repeat(4, 1fr); }
  .card img { height: 7rem; }
}
</style>
</head>
<body>
<h1>Visual exit: what it saves and what it changes</h1>
<p class="quiet">Every policy against the dense model on the same samples.
An answer counts as changed when a single token differs. FLOPs and KV cache are those a sample's prompt needs in the
decoder, without padding; times are measured, and given as a multiple of the dense model's.</p>
{% for image, caption in overview %}
<figure><img src="{{ image }}" alt="{{ caption.split('.')[0] }}" style="width: 35rem">
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% for section in sections %}
<h2>{{ section.run.name }}</h2>
<dl>{% for name, value in section.facts %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
<div class="scroll"><table>
<thead><tr>{% for _, title in columns %}<th>{{ title }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in section.table %}
<tr>{% for key, _ in columns %}<td>{{ row[key] }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% for image, caption, width in section.figures %}
<figure><img src="{{ image }}" alt="{{ caption.split('.')[0] }}" style="width: {{ width }}rem">
<figcaption>{{ caption }}</figcaption></figure>
{% endfor %}
{% if section.kinds %}
<h3>Per kind, {{ section.policy }}</h3>
<div class="scroll"><table>
<thead><tr>{% for _, title in kind_columns %}<th>{{ title }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in section.kinds %}
<tr>{% for key, _ in kind_columns %}<td>{{ row[key] }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
{% endif %}
{% if section.examples %}
<h3>Examples, {{ section.policy }}</h3>
<div class="cards">
{% for card in section.examples %}
<div class="card"><img src="{{ card.image }}" alt="">
<div><p>{{ card.question }}</p>
{% if card.agrees %}
<p><b>{{ card.exit or "(nothing)" }}</b></p>
{% else %}
<p><span class="quiet">dense</span> <b>{{ card.dense or "(nothing)" }}</b>
<span class="quiet">with exit</span> <b class="changed">{{ card.exit or "(nothing)" }}</b></p>
{% endif %}
<span class="quiet">{{ card.kind }}, {{ "never left" if card.layer == section.run.layers else "left after layer "
~ card.layer ~ " of " ~ section.run.layers }}</span>
<span class="track"><i style="width: {{ (100 * card.layer / section.run.layers) | round }}%"></i></span>
</div></div>
{% endfor %}
</div>
{% endif %}
{% endfor %}
</body>
</html>
"""
