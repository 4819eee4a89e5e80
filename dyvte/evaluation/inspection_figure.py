"""The figure of an inspection: attention of the text, what leaving changes, change of the text state, over layers."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from dyvte.evaluation.attention_shares import SEEN
from dyvte.report.style import COLOURS, FAINT, INK

SAFE = 0.99  # of the answers unchanged: where the figure says that the visual tokens are no longer needed


def plot_layers(result: dict[str, Any], title: str | None = None) -> Figure:
    """Three panels over the decoder layers: attention of the text, what leaving changes, change of the text state."""
    layers = list(range(1, result["layers"] + 1))
    figure = Figure(figsize=(5.6, 6.6), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[1.15, 1.15, 0.9])
    _plot_attention(top, layers, result)
    _plot_change(middle, layers, result)
    _plot_similarity(bottom, layers, result)
    bottom.set_xlabel("decoder layer")
    bottom.set_xlim(0.6, result["layers"] + 0.4)
    bottom.xaxis.set_major_locator(
        FixedLocator(layers) if len(layers) <= 16 else MaxNLocator(nbins=12, integer=True, steps=[1, 2, 4, 5, 10])
    )
    unneeded = result["unneeded_from"]
    if unneeded < result["layers"]:
        for axes in (top, middle, bottom):
            axes.axvline(unneeded, color=INK, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    figure.suptitle(title or f"{result['model']}, {result['samples']:,} questions", fontsize=10, color=INK)
    return figure


def _plot_attention(axes: Axes, layers: list[int], result: dict[str, Any]) -> None:
    from_text, from_last = result["attention"]["from_text"], result["attention"]["from_last"]
    named = {"visual": "visual tokens", "prompt": "text before the image", "text": "text after the image"}
    for name, colour, marker in zip(SEEN, COLOURS, ("o", "s", "^")):
        axes.plot(layers, from_text[f"to_{name}"], color=colour, marker=marker, markersize=4, label=named[name])
        axes.plot(layers, from_last[f"to_{name}"], color=colour, linewidth=0.9, linestyle=(0, (4, 2)))
    axes.plot([], [], color=FAINT, linewidth=0.9, linestyle=(0, (4, 2)), label="dashed: from the last token only")
    share = result["tokens"]["visual"] / sum(result["tokens"].values())
    axes.axhline(share, color=FAINT, linewidth=1.1, linestyle=":", label=f"visual share of all tokens, {share:.0%}")
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_title("Where the text after the image looks")
    axes.set_ylabel("share of attention")
    axes.legend(fontsize=7.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.04), handlelength=2.2)


def _plot_change(axes: Axes, layers: list[int], result: dict[str, Any]) -> None:
    for number, numbers in enumerate(result.get("by_kind", {}).values()):
        label = "each kind of question" if number == 0 else None
        axes.plot(layers, numbers["agreement"], color=FAINT, linewidth=0.7, alpha=0.8, zorder=1.5, label=label)
    axes.plot(layers, result["agreement"], color=COLOURS[0], marker="o", markersize=4, label="answers unchanged")
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("answers unchanged", color=COLOURS[0])
    axes.set_title("What leaving after this layer changes")
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.grid(False)
    kl = [value if value > 1e-6 else float("nan") for value in result["kl"]]
    right.semilogy(
        layers, kl, color=COLOURS[1], marker="s", markersize=3.5, linestyle=(0, (4, 2)), label="KL of the next token"
    )
    right.set_ylabel("KL of the next token, nats", color=COLOURS[1])
    handles = [h for a in (axes, right) for h in a.get_legend_handles_labels()[0]]
    if result["unneeded_from"] < result["layers"]:
        text = f"from here on at least {SAFE:.0%} unchanged"
        handles += axes.plot([], [], color=INK, linewidth=0.9, linestyle=(0, (1, 2)), label=text)
    axes.legend(handles=handles, fontsize=7.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.04))


def _plot_similarity(axes: Axes, layers: list[int], result: dict[str, Any]) -> None:
    similarity = result["similarity"]
    axes.plot(layers[1:], similarity["text"], color=COLOURS[2], marker="o", markersize=4, label="mean of the text")
    axes.plot(
        layers[1:],
        similarity["last"],
        color=COLOURS[3],
        marker="s",
        markersize=3.5,
        linestyle=(0, (4, 2)),
        label="last token",
    )
    axes.set_title("How much of the text state stays from the layer before")
    axes.set_ylabel("cosine")
    lowest = min(similarity["text"] + similarity["last"])
    axes.set_ylim(lowest - 0.25 * (1 - lowest), 1 + 0.08 * (1 - lowest))
    axes.legend(fontsize=7.5, loc="best")
