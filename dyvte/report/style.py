"""The look of every figure: colours, markers and matplotlib's settings."""

from __future__ import annotations

from typing import Any

from matplotlib.ticker import FuncFormatter

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
    "text.parse_math": False,  # a $ in a question is a dollar
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
}


def per_cent(value: float, _: Any = None) -> str:
    """A share as a label: 0.05 is 5 %."""
    return f"{round(100 * value, 6):g} %"


PER_CENT = FuncFormatter(per_cent)
