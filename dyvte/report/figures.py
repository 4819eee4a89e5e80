"""Figures of one run: where visual tokens leave, what a threshold risks, how reliable the heads are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from dyvte.report.style import COLOURS, FAINT, INK, PER_CENT

MAX_KINDS = 16


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
    missing = [key for key in keys if not isinstance(content, Mapping) or not isinstance(content.get(key), list)]
    lengths = {len(content[key]) for key in keys if key not in missing}
    if missing or len(lengths) != 1 or lengths == {0}:
        raise ValueError(f"{name} must hold lists of one length, {', '.join(keys)}; missing: {missing or 'none'}")
