"""Figures of one run: where visual tokens leave, what a threshold risks, how reliable the heads are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from dyvte.promise import Curve, Promise, Reliability
from dyvte.report.style import COLOURS, FAINT, INK, PER_CENT

MAX_KINDS = 16


def plot_exit_layers(bars: Mapping[str, Sequence[int]]) -> Figure:
    """One row of bars per kind of question: the share of its samples that exits after 1 ... L layers."""
    largest = sorted(bars, key=lambda kind: -sum(bars[kind]))[:MAX_KINDS]
    shares = {kind: [count / max(sum(bars[kind]), 1) for count in bars[kind]] for kind in bars if kind in largest}
    means = {kind: sum((i + 1) * share for i, share in enumerate(s)) for kind, s in shares.items()}
    order = sorted(shares, key=lambda kind: means[kind])
    layers = len(next(iter(shares.values())))
    figure = Figure(figsize=(4.2, 0.9 + 0.36 * len(order)), layout="constrained")
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


def plot_risk(promise: Promise) -> Figure:
    """Risk with its bound, and the share of visual-token layers saved, from setting to setting."""
    curve = promise.curve
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    place, label = _axis_of(curve)
    marker = "o" if len(curve) <= 20 else None
    upper.fill_between(place, curve.risk, curve.bound, color=COLOURS[0], alpha=0.18, linewidth=0)
    bound = f"upper bound, {100 * (1 - promise.delta):.0f} % confidence"
    upper.plot(place, curve.bound, color=COLOURS[0], linewidth=1.0, linestyle=(0, (4, 2)), label=bound)
    upper.plot(place, curve.risk, color=COLOURS[0], linewidth=1.6, marker=marker, markersize=3, label="changed answers")
    lower.plot(place, curve.saved, color=COLOURS[2], linewidth=1.6, marker=marker, markersize=3)
    upper.axhline(promise.alpha, color=COLOURS[1], linewidth=1.0, label=f"asked: {100 * promise.alpha:g} %")
    for axis in (upper, lower):
        axis.axvline(place[promise.chosen], color=INK, linewidth=0.8, linestyle=":")
    lower.text(place[promise.chosen], 1.0, " chosen", transform=lower.get_xaxis_transform(), va="top", fontsize=8)
    inside = [t for t in place if 0 < t < 1]
    if inside and sorted(inside)[len(inside) // 2] > 0.9:  # almost everything happens close to 1
        lower.set_xscale("logit")
        lower.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
        lower.xaxis.set_minor_formatter(NullFormatter())
    upper.set_ylabel("changed answers")
    lower.set_ylabel("visual layers\nsaved")
    lower.set_xlabel(label)
    for axis in (upper, lower):
        axis.yaxis.set_major_formatter(PER_CENT)
        axis.set_ylim(bottom=0)
    upper.legend(loc="upper right", frameon=True, facecolor="white", edgecolor="none", framealpha=1, borderpad=0.2)
    figure.align_ylabels()
    return figure


def _axis_of(curve: Curve) -> tuple[Sequence[float], str]:
    """Where the settings stand on an axis, and its name: by the value of the one number that varies, or in order."""
    names, values = list(curve.varied), list(curve.varied.values())
    if names == ["learned.threshold"]:
        return values[0], "threshold: agreement must be more probable to exit"
    if len(names) == 1 and all(isinstance(value, (int, float)) for value in values[0]):
        return values[0], names[0].replace(".", ": ")
    return range(1, len(curve) + 1), "setting, from the safest to the boldest"


def plot_reliability(table: Reliability) -> Figure:
    """How often exits agreed against how sure the heads were."""
    kept = [(c, f, n) for c, f, n in zip(table.confidence, table.frequency, table.count) if n > 0]
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
